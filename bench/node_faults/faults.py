"""The faults, by name: each is in force during one import, and beforehand where it is of what was looked up."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from random import Random

import numpy as np

from bench.node_faults.rig import BLOCKS, IMPORT_SECONDS_MAX, JUNK, LAYER_BYTES, LAYERS, NUMBERS, Rig, waited, while_copying
from bench.node_faults.wire import Passed
from bench.node_faults.wire_faults import FRAME_HARMS, HARMS, LASTING, Bytes, Frames, Refusal
from transport.backends.base import ImportJob

CHANGED_MAX = 8
LEAVES_SECONDS_MAX = 0.01
TOLD_BYTES = 20_000
"""About what an agent tells while an import goes on: 25 rounds."""


@dataclass
class Injected:
    """Whether a fault did something to its import, and what it does once the import has begun."""

    hit: Callable[[], bool] = lambda: True
    meanwhile: Callable[[], None] = lambda: None


Fault = Callable[[Rig, ImportJob], AbstractContextManager[Injected]]


@contextmanager
def on_the_wire(
    harm: Callable[[Random], Callable[[bytes], Passed]], once: bool, rig: Rig, job: ImportJob
) -> Iterator[Injected]:
    """Do harm to the bytes of blocks, or now and then to the question."""
    question = rig.random.random() < 0.2
    after = rig.random.randrange(2000 if question else 3000 + len(job) * LAYERS * LAYER_BYTES)
    fault = Bytes("owner" if question else "asker", after, harm(rig.random), once)
    rig.blocks.arm(fault)
    try:
        yield Injected(lambda: fault.hit)
    finally:
        rig.blocks.disarm()


@contextmanager
def refused(rig: Rig, job: ImportJob) -> Iterator[Injected]:
    """The owner's node takes no connections, and ended those that there were."""
    fault = Refusal()
    rig.blocks.arm(fault)
    try:
        yield Injected()
    finally:
        rig.blocks.disarm()


@contextmanager
def in_the_frames(name: str, rig: Rig, job: ImportJob) -> Iterator[Injected]:
    """Do harm to a frame that announces blocks."""
    fault = Frames(rig.random.randrange(4), FRAME_HARMS[name](rig.random))
    rig.blocks.arm(fault)
    try:
        yield Injected(lambda: fault.hit)
    finally:
        rig.blocks.disarm()


@contextmanager
def among_the_changes(rig: Rig, job: ImportJob) -> Iterator[Injected]:
    """What the node tells of its tables is cut off, or changed on the way."""
    harm = rig.random.choice([HARMS["cut"], HARMS["bytes changed"], HARMS["bytes left out"], HARMS["bytes twice"]])
    fault = Bytes("asker", rig.random.randrange(TOLD_BYTES), harm(rig.random))
    rig.changes.arm(fault)
    if rig.random.random() < 0.5:
        waited(lambda: fault.hit, IMPORT_SECONDS_MAX)
    try:
        yield Injected(lambda: fault.hit)
    finally:
        rig.changes.disarm()


def _some(rig: Rig, job: ImportJob) -> list[int]:
    places = job.source_blocks.tolist()
    chosen: list[int] = rig.random.sample(places, rig.random.randint(1, min(CHANGED_MAX, len(places))))
    return chosen


def _given_to_others(rig: Rig, places: list[int]) -> None:
    for place, number in zip(places, rig.random.sample(range(BLOCKS, NUMBERS), len(places)), strict=True):
        rig.owner.allot(place, number)


def _filled_again(rig: Rig, places: list[int]) -> None:
    of = {place: number for number, place in rig.owner.held.items()}
    for place in places:
        rig.owner.allot(place, of[place])


def _overwritten(rig: Rig, places: list[int]) -> None:
    rig.owner.table.invalidate(places)
    rig.owner.held = {number: place for number, place in rig.owner.held.items() if place not in places}
    for place in places:
        rig.owner.memory.put(place, np.full((LAYERS, LAYER_BYTES), JUNK, np.uint8))


def _another_epoch(rig: Rig, places: list[int]) -> None:
    rig.owner.close()
    rig.owner.open()


Change = Callable[[Rig, list[int]], None]
CHANGES: dict[str, Change] = {
    "another key's block": _given_to_others,
    "the same block anew": _filled_again,
    "overwritten": _overwritten,
    "another epoch": _another_epoch,
}


@contextmanager
def before(change: Change, rig: Rig, job: ImportJob) -> Iterator[Injected]:
    """Between look-up and copy."""
    change(rig, _some(rig, job))
    yield Injected()


@contextmanager
def under_the_copy(change: Change, rig: Rig, job: ImportJob) -> Iterator[Injected]:
    """While the owner's node copies."""
    places = _some(rig, job)
    with while_copying(lambda: change(rig, places)) as acted:
        yield Injected(acted.is_set)


@contextmanager
def all_the_time(rig: Rig, job: ImportJob) -> Iterator[Injected]:
    """The owner gives its blocks away all the time."""
    stop, places = threading.Event(), job.source_blocks.tolist()

    def change() -> None:
        while not stop.wait(0.0002):
            _given_to_others(rig, [rig.random.choice(places)])

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield Injected()
    finally:
        stop.set()
        thread.join()


def _soon(rig: Rig, act: Callable[[], None]) -> None:
    threading.Event().wait(rig.random.random() * LEAVES_SECONDS_MAX)
    act()


@contextmanager
def importer_leaves(rig: Rig, job: ImportJob) -> Iterator[Injected]:
    """The importing engine gives its KV memory up, and has it shared again."""

    yield Injected(meanwhile=partial(_soon, rig, rig.half.unmap))
    rig.share()


@contextmanager
def agent_ends(which: str, rig: Rig, job: ImportJob) -> Iterator[Injected]:
    """A node's agent ends, and is started again."""
    node = rig.a if which == "owner" else rig.b
    yield Injected(meanwhile=partial(_soon, rig, node.stop))
    rig.start_node(node)


def _wire(harms: dict[str, Callable[[Random], Callable[[bytes], Passed]]], once: bool) -> dict[str, Fault]:
    return {name: partial(on_the_wire, harm, once) for name, harm in harms.items()}


WITH_TLS: dict[str, Fault] = {
    **_wire(HARMS, True),
    **_wire(LASTING, False),
    "connections refused": refused,
    "the stream of changes harmed": among_the_changes,
    **{f"{name}, since the look-up": partial(before, change) for name, change in CHANGES.items()},
    **{f"{name}, under the copy": partial(under_the_copy, change) for name, change in CHANGES.items()},
    "blocks given away all the time": all_the_time,
    "the importing engine leaves": importer_leaves,
    "the owner's agent ends": partial(agent_ends, "owner"),
    "the importer's agent ends": partial(agent_ends, "importer"),
}
WITHOUT_TLS: dict[str, Fault] = {name: partial(in_the_frames, name) for name in FRAME_HARMS}
SLOW = {
    "silent past the deadline": 0.2,
    "a byte now and then, past the deadline": 0.2,
    "the stream of changes harmed": 0.3,
    "the owner's agent ends": 0.1,
    "the importer's agent ends": 0.1,
}
"""Those that take long come less often than others, by this."""
