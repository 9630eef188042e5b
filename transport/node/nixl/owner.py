"""What this node lets others read by NIXL: the memory of its tables' owners, registered when somebody first asks for it."""

import contextlib
import logging
import secrets
import threading
from collections.abc import Collection
from dataclasses import dataclass, field

from transport.errors import MemoryUnreachable
from transport.node.messages import PROBE, PROBE_BLOCK_BYTES, MemoryOffered, NodeError, OwnerKey, Placed
from transport.node.nixl.ability import Ability
from transport.node.nixl.orders import Disown, Own
from transport.node.nixl.process import NixlProcess, OrderFailed
from transport.node.threads import start_thread
from transport.table.layout import Memory, Region

_logger = logging.getLogger(__name__)

REGISTER_SECONDS_MAX = 300.0
"""An RDMA device pins memory, all of it, which takes some 100 ms a GB."""
WAIT_SECONDS = 0.5
"""Whoever asks for memory that takes longer is told to ask again."""

_PROBE_KEY = (PROBE, 0, 0)


@dataclass(slots=True)
class _Owned:
    """Memory that the process of `life` registers by the Own of this number: `offered` then, or the `failure`."""

    life: int
    order: int
    ended: threading.Event = field(default_factory=threading.Event)
    offered: MemoryOffered | None = None
    failure: str = ""


class NixlOwner:
    """Offers memory through `process`; `probe` is PROBE's. Any thread may call."""

    def __init__(self, process: NixlProcess, found: Ability, probe: Region) -> None:
        self._process = process
        self._found = found
        self._probe = probe
        self._owned: dict[OwnerKey, _Owned] = {}
        self._lock = threading.Lock()

    def ability(self) -> Ability:
        """Return what can be done now."""
        return Ability(reason=self._process.trouble) if self._process.trouble else self._found

    def offer(self, key: OwnerKey, memory: Memory | None) -> MemoryOffered:
        """Return where a table's memory lies for others. Raises NodeError if it cannot be read now."""
        key = _own_key(key)
        if memory is None and key != _PROBE_KEY:
            raise MemoryUnreachable(f"{key[0]} has no memory")
        with self._lock:
            owned = self._owned.get(key)
            if owned is None or owned.life != self._process.life:
                owned = _Owned(self._process.life, self._process.new_id())
                self._start(key, owned, memory)
                self._owned[key] = owned
        if not owned.ended.wait(WAIT_SECONDS):
            raise NodeError(f"the memory of {key[0]} is being registered")
        if owned.offered is None:
            raise NodeError(owned.failure)
        return owned.offered

    def _start(self, key: OwnerKey, owned: _Owned, memory: Memory | None) -> None:
        try:
            start_thread("peerkv-register", self._register, key, owned, memory)
        except NodeError as error:
            _logger.warning("the memory of %s is not registered: %s", key[0], error)
            raise

    def _register(self, key: OwnerKey, owned: _Owned, memory: Memory | None) -> None:
        regions = memory.regions if memory is not None else (self._probe,)
        try:
            done = self._process.ask(Own(owned.order, regions, writable=self._found.devices), REGISTER_SECONDS_MAX)
        except NodeError as error:
            owned.failure = str(error)
            if not isinstance(error, OrderFailed):  # it was not tried, or not to its end
                with self._lock:
                    if self._owned.get(key) is owned:
                        del self._owned[key]
                self._disown(owned)
            owned.ended.set()
            return
        layers = (
            tuple(Placed(done.addresses[of.region] + of.offset, of.stride, of.bytes, of.group) for of in memory.layers)
            if memory is not None
            else (Placed(done.addresses[0], PROBE_BLOCK_BYTES, PROBE_BLOCK_BYTES),)
        )
        owned.offered = MemoryOffered(secrets.randbits(62), self._process.name, layers, done.metadata)
        owned.ended.set()
        with self._lock:
            wanted = self._owned.get(key) is owned and owned.life == self._process.life
        if not wanted:  # its owner ended meanwhile, perhaps before this was ordered
            self._disown(owned)

    def holds(self, key: OwnerKey, offer: int) -> bool:
        """Tell whether what was offered under that number can still be read as it was offered."""
        with self._lock:
            owned = self._owned.get(_own_key(key))
            offered = owned.offered if owned is not None and owned.life == self._process.life else None
            return offered is not None and offered.offer == offer

    def drop(self, keys: Collection[OwnerKey]) -> None:
        """Let go of these owners' memory. First it is held no more: what is read from then on may be anything."""
        with self._lock:
            dropped = [owned for key in keys if (owned := self._owned.pop(key, None)) is not None]
        for owned in dropped:
            self._disown(owned)

    def _disown(self, owned: _Owned) -> None:
        with contextlib.suppress(NodeError):  # the process is gone, and the memory with it
            self._process.tell(Disown(owned.order))


def _own_key(key: OwnerKey) -> OwnerKey:
    """Memory for measuring is registered once, whatever epoch and rank a node asks for."""
    return _PROBE_KEY if key[0] == PROBE else key
