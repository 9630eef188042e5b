"""Fetches blocks from another node by NIXL. Where they lie, and whether they are still good, its agent tells over TLS.

The protocol is that of every import: the states were looked up before, the bytes are read, and only then the owner's node looks
at the states again. Until it has said so, what was read is not a block.
"""

import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from transport.backends.shared_memory import checksum
from transport.node.block_client import BlockClient
from transport.node.block_fetcher import FETCH_SECONDS_MAX, Fetched, NotOffered, StillWritten
from transport.node.messages import (
    BLOCKS_ASKED_MAX,
    BlocksAsked,
    CheckAsked,
    Checked,
    MemoryAsked,
    MemoryOffered,
    NodeError,
    OwnerKey,
)
from transport.node.nixl.orders import Forget, Know
from transport.node.nixl.process import NixlProcess, OrderFailed, Transfer
from transport.node.nixl.spans import chunks
from transport.node.staging import Piece
from transport.table.layout import CHECKSUM_BYTES
from transport.table.quality import in_code

PROGRESS_SECONDS = 3.0
"""The longest time in which none of the reads under way ends."""
READS_MAX = 16
"""Reads of a fetch that are under way at a time."""
OFFERS_MAX = 256
"""Tables whose memory is remembered."""
REFUSED_SECONDS = 5.0
"""Memory that was not offered is not asked for again for so long."""


@dataclass(frozen=True, slots=True)
class _Known:
    life: int
    offered: MemoryOffered

    @property
    def agent(self) -> str:
        """Whom it is read from."""
        return self.offered.agent


def agent_of(node: str) -> str:
    """Return how the names of the processes begin that a node's memory is read from."""
    return f"nixl-owner-{node}-"


class NixlClient:
    """A BlockFetcher for the node that `client` asks, by way of `process`."""

    def __init__(self, client: BlockClient, process: NixlProcess) -> None:
        self._client = client
        self._process = process
        self._known: OrderedDict[OwnerKey, _Known] = OrderedDict()
        self._refused: OrderedDict[OwnerKey, tuple[float, str]] = OrderedDict()
        self._asking: dict[OwnerKey, Future[_Known]] = {}
        self._begun: set[Transfer] = set()
        self._lock = threading.Lock()
        self._closed = False

    def fetch(self, asked: BlocksAsked, sizes: Sequence[int], target: Piece) -> Fetched:
        """As BlockFetcher has it. `target` is a piece of the process's memory."""
        if len(asked.ids) != 4 * len(sizes) or len(asked.states) != 8 * len(sizes) or len(sizes) > BLOCKS_ASKED_MAX:
            raise NodeError("ids, states and sizes of blocks that do not fit together")
        if in_code(np.frombuffer(asked.states, "<u8")).any():
            raise NotOffered("blocks that lie coded are decoded where they lie")
        known = self._find(asked)
        ids = np.frombuffer(asked.ids, "<u4").astype(np.int64)
        slots = (target.begin, target.stride, len(target.rows))
        try:
            self._read(known, chunks(known.offered.layers, ids, asked.counts or (len(ids),), sizes, slots), target)
        except NodeError:
            self._forget(known)
            raise
        return self._checked(known, asked, sizes, target)

    def close(self) -> None:
        """As BlockFetcher has it."""
        with self._lock:
            self._closed = True
            known, begun = list(self._known.values()), list(self._begun)
        for transfer in begun:
            transfer.give_up("the node is not asked any more")
        for each in known:
            self._forget(each)

    def _find(self, asked: BlocksAsked) -> _Known:
        """Return where the memory lies, asking for it if that is not known. Raises NodeError, NotOffered.

        A fetch comes in parts, each in a thread of its own: the first one asks for all of them.
        """
        key = (asked.name, asked.epoch, asked.rank)
        with self._lock:
            known, refused, asking = self._known.get(key), self._refused.get(key), self._asking.get(key)
            if known is not None and known.life == self._process.life:
                return known
            if refused is not None and time.monotonic() < refused[0]:
                raise NotOffered(refused[1])
            if asking is None:
                mine = self._asking[key] = Future()
        if asking is not None:
            try:
                return asking.result(FETCH_SECONDS_MAX)
            except TimeoutError as error:
                raise NodeError("it takes too long", "slow") from error
        try:
            mine.set_result(self._ask(key))
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._asking[key]
        return mine.result()

    def _ask(self, key: OwnerKey) -> _Known:
        """Ask where the memory lies, and have NIXL know it. Raises NodeError, NotOffered."""
        offered = self._client.ask(MemoryAsked(*key))
        if not isinstance(offered, MemoryOffered):
            raise NodeError("the node answers something else")
        if not offered.layers:
            with self._lock:
                self._refused[key] = time.monotonic() + REFUSED_SECONDS, offered.reason
                _bound(self._refused)
            raise NotOffered(offered.reason)
        if not offered.agent.startswith(agent_of(self._client.node)):
            raise NodeError("the node offers another one's memory")
        known = _Known(self._process.life, offered)
        try:
            self._process.ask(Know(self._process.new_id(), offered.agent, offered.metadata))
        except NodeError as error:  # NIXL may have taken in a part of it, which it cannot be made to forget, or is stuck
            if isinstance(error, OrderFailed) or not self._process.trouble:
                self._process.end(f"what {self._client.node} told of itself cannot be taken in: {error}")
            raise
        with self._lock:
            self._known[key] = known
            _bound(self._known)
        return known

    def _forget(self, known: _Known) -> None:
        """Whatever was read through that process there is asked for anew."""
        with self._lock:
            for key in [key for key, each in self._known.items() if each.agent == known.agent]:
                del self._known[key]
        if known.life == self._process.life:
            try:
                self._process.tell(Forget(known.agent))
            except NodeError:  # it is gone, and knows nobody
                return

    def _read(self, known: _Known, pieces: list[npt.NDArray[np.uint64]], target: Piece) -> None:
        until = time.monotonic() + FETCH_SECONDS_MAX
        begun: deque[Transfer] = deque()
        try:
            for spans in pieces:
                if len(begun) >= READS_MAX:
                    self._end(begun, until)
                transfer = self._process.read(known.agent, spans.astype("<u8", copy=False).tobytes(), known.life)
                begun.append(transfer)
                target.writing.append(transfer)
                with self._lock:
                    self._begun.add(transfer)
                    if self._closed:
                        raise NodeError("the node is not asked any more")
            while begun:
                self._end(begun, until)
        except NodeError as error:
            for transfer in begun:
                transfer.give_up()
            if any(not transfer.over for transfer in begun):
                raise StillWritten(str(error), error.loss) from error
            raise
        finally:
            with self._lock:
                self._begun.difference_update(begun)

    def _end(self, begun: deque[Transfer], until: float) -> None:
        """Wait for the read that began first. Raises NodeError."""
        begun[0].wait(_patience(until))
        with self._lock:
            self._begun.discard(begun.popleft())

    def _checked(self, known: _Known, asked: BlocksAsked, sizes: Sequence[int], target: Piece) -> Fetched:
        answer = self._client.ask(CheckAsked(known.offered.offer, asked))
        if not isinstance(answer, Checked):
            raise NodeError("the node answers something else")
        if answer.reason:
            self._forget(known)
            return Fetched(np.zeros(len(sizes), np.bool_), answer.reason)
        if len(answer.good) != len(sizes):
            raise NodeError("the node speaks of other blocks")
        good = np.frombuffer(answer.good, np.uint8) == 1
        changed = int((~good).sum())
        if answer.sums:
            good &= _intact(answer, sizes, target)
        damaged = int((~good).sum()) - changed
        reasons = [f"{changed} blocks were reallocated before they were read"] if changed else []
        reasons += [f"{damaged} blocks do not match their checksums"] if damaged else []
        return Fetched(good, "; ".join(reasons))


def _bound(remembered: OrderedDict[Any, Any]) -> None:
    while len(remembered) > OFFERS_MAX:
        remembered.popitem(last=False)


def _patience(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise NodeError("it takes too long", "slow")
    return min(PROGRESS_SECONDS, left)


def _intact(answer: Checked, sizes: Sequence[int], target: Piece) -> npt.NDArray[np.bool_]:
    """Tell which blocks match the checksums that the owner stored."""
    if len(answer.sums) != CHECKSUM_BYTES * len(sizes) or len(answer.keys) != 16 * len(sizes):
        raise NodeError("the node speaks of other blocks")
    places = itertools.count(0, CHECKSUM_BYTES)
    return np.array(
        [
            checksum(memoryview(row[:size]), answer.keys[at : at + 16]) == answer.sums[at : at + CHECKSUM_BYTES]
            for row, size, at in zip(target.rows, sizes, places, strict=False)
        ],
        np.bool_,
    )
