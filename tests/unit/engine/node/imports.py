"""Imports as an engine's worker makes them, out of an owner's memory on its own node or on another one."""

from pathlib import Path

import numpy as np

from engine.connector.step_messages import StepMetadata
from engine.connector.worker import WorkerHalf
from tests.unit.engine.node.two_nodes import Node
from tests.unit.transport.backends.test_copy import BLOCKS, KEYS, fill
from tests.unit.transport.table_fixtures import writer
from tests.unit.waiting import until
from transport.backends.base import ImportJob
from transport.backends.shared_memory import SharedMemoryTransport
from transport.table.directory import TableDirectory


class Pair:
    """An owner with a table in `theirs`, and an importer that calls it `source` and has its tables in `ours`."""

    def __init__(self, theirs: Path, ours: Path, source: str) -> None:
        self.source = source
        self.owner_tables, self.importer_tables = theirs, ours
        self.here = TableDirectory(ours)
        self.closing = []

    def own(self, layout, groups=None):
        self.theirs = layout()
        fill(self.theirs, 1)
        memory = SharedMemoryTransport(self.theirs, BLOCKS, groups=groups).memory()
        self.table = writer(self.owner_tables, "owner", BLOCKS, memories=(memory,))
        self.closing.append(self.table.close)

    def worker(self, layout, groups=None):
        self.caches = layout()
        fill(self.caches, 2)
        self.half = WorkerHalf(self.importer_tables, "importer", 0)
        self.half.register(self.caches, BLOCKS, groups)
        self.closing.append(self.half.close)

    def look_up(self, blocks, targets, counts=()):
        """Look up what is offered, once the table here says so."""
        until(
            lambda: self.source in self.here.tables() and len(self.here.tables()[self.source].longest_run(KEYS)) == len(blocks),
            "a table",
        )
        table = self.here.tables()[self.source]
        run = table.longest_run(KEYS[: len(blocks)])
        return ImportJob("r", self.source, table.epoch, run.block_ids, run.states, np.array(targets, np.int32), counts)

    def job(self, blocks, targets, counts=()):
        """Offer blocks and look them up."""
        self.table.publish(blocks, KEYS[: len(blocks)])
        return self.look_up(blocks, targets, counts)

    def imported(self, job):
        self.half.start(StepMetadata(1, (job,)))
        until(self.half.poll, "the end of the import")
        errors, failed = self.half.take_load_errors(), self.half.take_failed()
        return self.half.take_report().imports["r"], errors, failed

    def close(self):
        for each in reversed(self.closing):
            each()


class NodePair(Pair):
    """node-a owns blocks, node-b imports them."""

    def __init__(self, owner: Node, importer: Node) -> None:
        super().__init__(owner.tables, importer.tables, f"{owner.name}:owner")
        self.a, self.b = owner, importer

    @property
    def way(self):
        """How node-b fetches from node-a; None while it does not hear it."""
        following = self.b.agent._following.get(self.a.name)
        return following[0].client if following is not None else None
