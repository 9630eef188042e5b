"""Two nodes with real agents, block tables and memory; the wires between them, and an engine's worker that imports."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

from bench.node_faults.wire import Wire
from engine.connector.step_messages import ImportReport, StepMetadata
from engine.connector.worker import WorkerHalf
from engine.node.settings import Peer
from tests.unit.engine.node.two_nodes import Node, free_port, nodes
from tests.unit.transport.table_fixtures import writer
from transport.backends.base import ImportJob
from transport.backends.shared_memory import SharedMemoryTransport
from transport.keys import chain_keys, root_key
from transport.node.block_copy import OwnerMemory
from transport.table.directory import TableDirectory
from transport.table.reader import Run

BLOCKS, LAYERS, LAYER_BYTES, BLOCK_TOKENS = 64, 3, 1024, 16
NUMBERS = 2 * BLOCKS
"""Blocks that there are in the world: an owner holds some of them, in any place."""
KEYS = chain_keys(root_key(b"f" * 16), range(NUMBERS * BLOCK_TOKENS), BLOCK_TOKENS)
OWNER, SOURCE = "owner", "node-a:owner"
JUNK = 0xEE
IMPORT_SECONDS_MAX = 10.0
"""What has not ended then hangs."""
SETTLE_SECONDS_MAX, OFFERED_AGAIN_SECONDS = 60.0, 5.0
QUICK: dict[str, object] = {
    "transport.node.sockets.PROGRESS_SECONDS": 0.3,
    "transport.node.sockets.CONNECT_SECONDS": 1.0,
    "transport.node.block_client.FETCH_SECONDS_MAX": 0.5,
    "transport.node.fetches.FETCH_SECONDS_MAX": 2.0,
    "transport.node.block_copy.CHUNK_BYTES": 4 * LAYERS * LAYER_BYTES,
    "engine.node.local_fetch.PART_BYTES_MIN": 16 * LAYERS * LAYER_BYTES,
    "engine.node.telling.TICKS": 1,
    "engine.node.following.PAUSE_SECONDS": 0.01,
    "engine.node.following.PAUSE_SECONDS_MAX": 0.05,
}
"""Deadlines, and sizes of frames and parts, of which a small import has several."""

Bytes = npt.NDArray[np.uint8]


def true_blocks() -> Bytes:
    """What a block has to be, by its number: uint8 (NUMBERS, LAYERS, LAYER_BYTES)."""
    return np.random.default_rng(1).integers(0, 256, (NUMBERS, LAYERS, LAYER_BYTES), np.uint8)


class Memory:
    """KV memory of an engine."""

    def __init__(self) -> None:
        self.tensors = {f"layer.{layer}": torch.zeros((BLOCKS, LAYER_BYTES), dtype=torch.uint8) for layer in range(LAYERS)}

    @property
    def layers(self) -> list[Bytes]:
        """Views of its tensors as they lie now, uint8 (BLOCKS, LAYER_BYTES): they move when they are shared."""
        return [tensor.numpy() for tensor in self.tensors.values()]

    def put(self, block: int, content: Bytes) -> None:
        """Write a block, layer by layer, as an engine does."""
        for layer, of_layer in zip(self.layers, content, strict=True):
            layer[block] = of_layer

    def all(self) -> Bytes:
        """A copy, (BLOCKS, LAYERS, LAYER_BYTES)."""
        return np.stack(self.layers, 1)


class Owner:
    """The engine on node-a. `held` tells which block (by number) lies where."""

    def __init__(self, tables: Path, random: Random, true: Bytes) -> None:
        self._tables, self._random, self._true = tables, random, true
        self._transport: SharedMemoryTransport | None = None
        self.held: dict[int, int] = {}
        self.open()

    def open(self) -> None:
        """Begin an epoch, with the first blocks of the chain in places of their own."""
        self.memory = Memory()
        self._transport = SharedMemoryTransport(self.memory.tensors, BLOCKS)
        self.table = writer(self._tables, OWNER, BLOCKS, BLOCK_TOKENS, memories=(self._transport.memory(),))
        places = self._random.sample(range(BLOCKS), BLOCKS)
        self.held = {}
        for number, place in enumerate(places):
            self.allot(place, number)

    def allot(self, place: int, number: int) -> None:
        """Give a block's place to another one, or to the same again: withdrawn, overwritten, filled, offered."""
        self.table.invalidate([place])
        self.held = {known: where for known, where in self.held.items() if where != place and known != number}
        self.memory.put(place, np.full((LAYERS, LAYER_BYTES), JUNK, np.uint8))
        self.memory.put(place, self._true[number])
        self.table.publish([place], KEYS[number : number + 1])
        self.held[number] = place

    def settle(self) -> None:
        """Hold the first blocks of the chain again."""
        free = [place for place in range(BLOCKS) if place not in {w for n, w in self.held.items() if n < BLOCKS}]
        for number in range(BLOCKS):
            if number not in self.held:
                self.allot(free.pop(), number)

    def close(self) -> None:
        """End it."""
        self.table.close()


@dataclass(frozen=True)
class Imported:
    """How an import went: `job` names blocks by number and target; `report` is None where it hung."""

    numbers: Sequence[int]
    targets: Sequence[int]
    report: ImportReport | None
    seconds: float
    wrong: int
    late: int

    @property
    def failed(self) -> int:
        """Blocks that are to be computed."""
        return len(self.report.failed_blocks) if self.report is not None else len(self.numbers)


class Rig:
    """node-a owns blocks, node-b imports them over `blocks` and hears of them over `changes`."""

    def __init__(self, a: Node, b: Node, random: Random) -> None:
        self.a, self.b, self.random, self.true = a, b, random, true_blocks()
        port = free_port()
        self.changes, self.blocks = Wire(port, a.port), Wire(port + 1, a.port + 1)
        self._far = Peer(a.name, "127.0.0.1", port)
        self.here = TableDirectory(b.tables)
        self.start_node(a)
        self.start_node(b)
        self.owner = Owner(a.tables, random, self.true)
        self._held = TableDirectory(a.tables)
        self._number = self._late = 0
        self._run: Run
        self.memory = Memory()
        self.half = WorkerHalf(b.tables, "importer", 0)
        self.share()
        self._left = self.memory.all()

    def start_node(self, node: Node) -> None:
        """Start a node's agent: node-b follows node-a."""
        node.start(*([self._far] if node is self.b else []))

    def share(self) -> None:
        """Have the importer's memory shared, and imported into."""
        self.half.register(self.memory.tensors, BLOCKS)

    def settle(self) -> None:
        """Have node-b know the first blocks of the chain in node-a's present epoch."""
        self.owner.settle()
        deadline = time.monotonic() + SETTLE_SECONDS_MAX
        while not waited(self._known, OFFERED_AGAIN_SECONDS):
            assert time.monotonic() < deadline, "what node-a holds did not come about"
            for number, place in list(self.owner.held.items()):  # a full bucket of an index lets go of a block that is held
                self.owner.allot(place, number)
            self.owner.settle()

    def _known(self) -> bool:
        table = self.here.tables().get(SOURCE)
        if table is None or table.epoch != self.owner.table.epoch:
            return False
        self._run = table.longest_run(KEYS[:BLOCKS])
        states, _ = self._held.tables()[OWNER].content(self._run.block_ids.astype(np.int64))
        return len(self._run) == BLOCKS and bool((states == self._run.states).all())

    def job(self) -> tuple[ImportJob, Sequence[int]]:
        """Ask for some of the blocks that were looked up, for any places of the importer; return them by number, too."""
        run = self._run
        count = self.random.randint(1, len(run))
        targets = np.array(self.random.sample(range(BLOCKS), count), np.int32)
        self._number += 1
        name = f"request-{self._number}"
        return ImportJob(name, SOURCE, self.owner.table.epoch, run.block_ids[:count], run.states[:count], targets), range(count)

    def begin(self, job: ImportJob) -> None:
        """Begin an import, into blocks full of junk."""
        for target in job.target_blocks.tolist():
            self.memory.put(target, np.full((LAYERS, LAYER_BYTES), JUNK, np.uint8))
        self._late = int((self.memory.all() != self._left).any((1, 2))[self._others(job)].sum())
        self.half.start(StepMetadata(self._number, (job,)))

    def end(self, job: ImportJob, numbers: Sequence[int], begun: float) -> Imported:
        """Await an import's end, and compare every block of the importer's memory with what it has to be."""
        report = None
        while time.monotonic() - begun < IMPORT_SECONDS_MAX and report is None:
            if self.half.poll():
                self.half.take_load_errors()
                report = self.half.take_report().imports[job.request_id]
            else:
                time.sleep(0.0005)
        seconds = time.monotonic() - begun
        now, targets = self.memory.all(), job.target_blocks.tolist()
        failed = report.failed_blocks if report is not None else frozenset(targets)
        wrong = sum(
            target not in failed and not np.array_equal(now[target], self.true[number])
            for number, target in zip(numbers, targets, strict=True)
        )
        beyond = (now != self._left).any((1, 2))[self._others(job)].sum()
        self._left = now
        return Imported(numbers, targets, report, seconds, wrong, self._late + int(beyond))

    def _others(self, job: ImportJob) -> npt.NDArray[np.bool_]:
        """Tell which blocks an import has nothing to do with."""
        others = np.ones(BLOCKS, np.bool_)
        others[job.target_blocks] = False
        return others

    def close(self) -> None:
        """End everything but the nodes."""
        self.half.close()
        self.owner.close()
        self.here.close()
        self._held.close()
        self.changes.close()
        self.blocks.close()


def waited(holds: Callable[[], bool], seconds: float) -> bool:
    """Wait until it holds, and tell whether it came about."""
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.002)
    return held


@contextmanager
def rig(path: Path, random: Random, keys: bool) -> Iterator[Rig]:
    """A rig, with keys and so with TLS or without."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        for name, value in QUICK.items():
            stack.enter_context(mock.patch(name, value))
        a, b = stack.enter_context(nodes(path, "node-a", "node-b", keys=keys))
        made = Rig(a, b, random)
        stack.callback(made.close)
        made.settle()
        yield made


@contextmanager
def while_copying(act: Callable[[], None]) -> Iterator[threading.Event]:
    """Have `act` done once, while the owner's node copies blocks: some layers are copied before it and some after."""
    copied, lock = OwnerMemory.copied, threading.Lock()
    acted, over = threading.Event(), threading.Event()

    def hooked(memory: OwnerMemory, *args: Any) -> Any:
        before = copied(memory, *args)
        with lock:
            if not acted.is_set() and not over.is_set():
                act()
                acted.set()
        after = copied(memory, *args)
        half = before.shape[1] // 2
        before[:, half:] = after[:, half:]
        return before

    with mock.patch.object(OwnerMemory, "copied", hooked):
        try:
            yield acted
        finally:
            with lock:  # a copy that nobody waits for any more changes nothing beside us
                over.set()
