"""Decodes blocks that lie coded in host memory, before they are sent: nodes fetch blocks as engines have them.

Its loops are compiled by numba, for seconds where they never were on this machine. Until they are, and where they cannot be,
coded blocks are neither told to other nodes nor sent.
"""

import importlib.util
import logging
import mmap
import threading
from typing import get_args

import numpy as np
import numpy.typing as npt

from transport.backends.coded_blocks import CodedBlocks, shape_of
from transport.backends.shared_memory import checksum
from transport.errors import MemoryUnreachable
from transport.frames.codecs import compile_codec
from transport.frames.errors import FrameError
from transport.node.messages import NodeError
from transport.node.threads import start_thread
from transport.table.layout import Memory, SlotCodec
from transport.table.reader import TableReader

_logger = logging.getLogger(__name__)


def can_decode() -> bool:
    """Tell whether this node's agent can decode at all."""
    return importlib.util.find_spec("numba") is not None


class Decoder:
    """Any thread may call."""

    def __init__(self) -> None:
        self._begun = threading.Lock()
        self._ready = threading.Event()

    def prepare(self) -> None:
        """Begin to compile, if nobody did before."""
        if can_decode() and self._begun.acquire(blocking=False):
            try:
                start_thread("peerkv-decode", self._compile)
            except NodeError as error:  # it is tried again
                _logger.warning("coded blocks cannot be sent: %s", error)
                self._begun.release()

    @property
    def ready(self) -> bool:
        """Whether blocks can be decoded now."""
        return self._ready.is_set()

    def _compile(self) -> None:
        try:
            for codec in get_args(SlotCodec):
                compile_codec(codec)
        except Exception as error:  # noqa: BLE001 - whatever numba meets, blocks that lie coded are a miss, and all else goes on
            _logger.warning("coded blocks cannot be sent: %r", error)
            return
        self._ready.set()


class CodedMemory:
    """What lies coded in an owner's mapped memory. Raises MemoryUnreachable if it is not as described."""

    def __init__(self, reader: TableReader, memory: Memory, maps: tuple[mmap.mmap, ...], decoder: Decoder) -> None:
        coded = memory.coded
        if coded is None or not 0 <= coded.region < len(maps) or any(layer.group for layer in memory.layers):
            raise MemoryUnreachable(f"{reader.name} describes coded blocks that cannot be")
        shape = shape_of(coded, sum(layer.bytes for layer in memory.layers))
        checked = memory.checksums is not None
        self._blocks = CodedBlocks(coded, shape, maps[coded.region], reader.num_blocks, checked=checked)
        self._decoder = decoder

    def decode(
        self, reader: TableReader, ids: npt.NDArray[np.int64], content: npt.NDArray[np.uint8], places: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Put blocks, decoded, into `places` of `content`, uint8 (n, bytes); tell which of them could be, (len(places),)."""
        good = np.zeros(len(places), np.bool_)
        if not self._decoder.ready:
            self._decoder.prepare()
            return good
        for number, place in enumerate(places.tolist()):
            block = int(ids[place])
            code, said = self._blocks.read(block)
            if not said or checksum(code.data, reader.key(block)) == said:
                try:
                    content[place] = self._blocks.decoded(code)
                except FrameError:  # it was overwritten while it was read
                    continue
                good[number] = True
        return good
