"""The host-memory tier as a GPU's worker sees it: the kernel of imports copies blocks into slots, on a stream of its own.

A copy waits for what the engine enqueued before its store was begun, and the engine's stream, before a step, for the copies of
what the step overwrites: no others, and as blocks are stored ahead, mostly for none. Imports wait by themselves for copies of
what they overwrite (`CudaIpcTransport`). A slot is told to be filled once the copy's event says so.
"""

import logging
from collections import deque
from collections.abc import Set
from concurrent.futures import Future
from dataclasses import dataclass, field

from engine.tiers.self_test import FAILED, compare
from engine.tiers.slots import Slots
from engine.tiers.stores import Store, Stores
from transport.backends.cuda_ipc import CudaIpcTransport, Enqueued, Opened
from transport.backends.shared_memory import map_region
from transport.errors import MemoryUnreachable
from transport.table.quality import IN_CODE

_logger = logging.getLogger(__name__)

LAUNCH_BLOCKS_MIN = 16
"""So many blocks that no step waits for are copied by one launch, which takes the step that it falls into some 0.1 ms."""
LAUNCH_BLOCKS_MAX, LAUNCHES_MAX = 256, 4
"""So many of them go into a launch, and so many launches into a step that is not the last one: a step waits for all of a launch
and for those before."""


@dataclass(slots=True)
class _Launched:
    """A copy that was begun; what is `lost` of it was overwritten before it was known to have ended."""

    stores: list[Store]
    copy: Enqueued
    lost: set[int] = field(default_factory=set)


class CudaSlotWriter:
    """Writes one rank's part of a region, from when it is open; what is overwritten before that is lost. Raises
    MemoryUnreachable if the region does not open for what this process writes of it by itself, the groups' bytes.

    With a `free` slot, which is new, what does not pass the self-test (self_test.py) does not open.
    """

    def __init__(self, own: CudaIpcTransport, slots: Slots, free: int | None = None) -> None:
        self._own = own

        def try_out(opened: Opened) -> None:
            if free is not None:
                for group, (layers, back) in enumerate(own.round_trips(opened, free)):
                    compare(slots, free, group, layers, b"")
                    if back != layers:
                        raise MemoryUnreachable(f"{FAILED}: a block of KV cache group {group} came back changed")

        self._slots: Future[Opened] = own.open_slots(slots.memory, slots.count, try_out)
        self._groups = 1 + max(layer.group for layer in slots.memory.layers)
        self._group_bytes = slots.memory.group_bytes
        self._map = map_region(slots.memory.regions[0], writable=True) if self._group_bytes is not None else None
        self._waiting: list[Store] = []
        self._launched: deque[_Launched] = deque()
        self._lost: list[int] = []
        self._refused = False
        self._closed = False

    def begin(self, stores: Stores) -> None:
        """Take in what a step brings, and have the engine's stream wait for what the step overwrites."""
        if self._closed or not (stores.begun or stores.overwritten or stores.imported or stores.lost):
            return
        self._waiting += stores.begun
        if stores.lost:
            self._lose(stores.lost)
        slots = self._opened()
        urgent = self._take_waiting(stores.overwritten), self._take_waiting(stores.imported)
        if slots is None:
            self._lost += [store.slot for waited in urgent for store in waited]
            return
        for waited in urgent:
            for begin in range(0, len(waited), LAUNCH_BLOCKS_MAX):
                self._launch(slots, waited[begin : begin + LAUNCH_BLOCKS_MAX])
        for launched in reversed(self._launched):  # one stream: the last of them ends last
            if any(store.block in stores.overwritten for store in launched.stores):
                self._own.hold_up(launched.copy)
                break
        launches, least = (len(self._waiting), 1) if stores.at_once else (LAUNCHES_MAX, LAUNCH_BLOCKS_MIN)
        for _ in range(launches):
            if len(self._waiting) < least:
                break
            ahead, self._waiting = self._waiting[:LAUNCH_BLOCKS_MAX], self._waiting[LAUNCH_BLOCKS_MAX:]
            self._launch(slots, ahead)

    def take_copied(self) -> list[int]:
        """Return the slots that were filled since the last call."""
        copied: list[int] = []
        while self._launched and self._launched[0].copy.end.query():
            launched = self._launched.popleft()
            launched.lost |= _unfit(launched)
            copied += [store.slot for store in launched.stores if store.slot not in launched.lost]
            self._lost += launched.lost
        return copied

    def take_lost(self) -> list[int]:
        """Return the slots that will not be filled, once."""
        lost, self._lost = self._lost, []
        return lost

    def close(self) -> None:
        """Wait for the copies under way, and begin none any more."""
        if not self._closed:
            self._closed = True
            self._own.close_slots(self._slots)

    def _opened(self) -> Opened | None:
        """Return the slots once they are open; while they cannot be, nothing that waits can be stored."""
        if not self._slots.done():
            return None
        error = self._slots.exception()
        if error is None:
            return self._slots.result()
        if not self._refused:
            self._refused = True
            _logger.warning("nothing is stored in host memory: %s", error)
        self._lost += [store.slot for store in self._waiting]
        self._waiting = []
        return None

    def _take_waiting(self, blocks: Set[int]) -> list[Store]:
        taken = [store for store in self._waiting if store.block in blocks]
        if taken:
            self._waiting = [store for store in self._waiting if store.block not in blocks]
        return taken

    def _lose(self, blocks: Set[int]) -> None:
        """These blocks are being overwritten already: what is not known to be copied is lost."""
        self._lost += [store.slot for store in self._take_waiting(blocks)]
        for launched in self._launched:
            launched.lost.update(store.slot for store in launched.stores if store.block in blocks)

    def _launch(self, slots: Opened, stores: list[Store]) -> None:
        groups: list[tuple[list[int], list[int]]] = [([], []) for _ in range(self._groups)]
        coded: tuple[list[int], list[int]] = ([], [])
        for store in stores:
            blocks, targets = coded if store.quality & IN_CODE else groups[store.group]
            blocks.append(store.block)
            targets.append(store.slot)
            if self._map is not None and self._group_bytes is not None:  # nothing is on offer in the slot now
                self._map[self._group_bytes.offset + store.slot * self._group_bytes.stride] = store.group + 1
        self._launched.append(_Launched(stores, self._own.store(slots, groups, coded)))


def _unfit(launched: _Launched) -> set[int]:
    """Return the slots of a copy that ended whose blocks could not be coded."""
    unfit = launched.copy.unfit
    if unfit is None:
        return set()
    coded = [store.slot for store in launched.stores if store.quality & IN_CODE]
    return {slot for slot, wrong in zip(coded, unfit.tolist(), strict=True) if wrong}
