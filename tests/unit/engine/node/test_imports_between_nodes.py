"""Imports from another node, beyond what every way of reading has to do: what agents do for them, and what becomes of agents.

Two agents with keys; the importer is the worker's half of an engine, over real KV memory.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from unittest import mock

import msgspec
import pytest
import torch

from engine.connector.step_messages import StepMetadata
from engine.joined_fleet import read_nodes
from engine.node.fetch_counts import FetchCounts, read_fetches
from engine.node.settings import Peer
from tests.unit.engine.node.imports import NodePair
from tests.unit.engine.node.two_nodes import nodes
from tests.unit.shortages import no_threads
from tests.unit.transport.backends.test_copy import BLOCKS, own_allocations, rows
from tests.unit.transport.table_fixtures import writer
from tests.unit.waiting import until
from transport.backends.shared_memory import SharedMemoryTransport, map_region
from transport.errors import MemoryUnreachable
from transport.node.block_client import BlockClient
from transport.node.fetches import Fetches
from transport.table.directory import TableDirectory

SOURCE = "node-a:owner"


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[NodePair]:
    with nodes(tmp_path, "node-a", "node-b") as (a, b):
        a.start(b.peer)
        b.start(a.peer)
        made = NodePair(a, b)
        yield made
        made.close()


def test_an_owner_that_ended_fails_the_whole_import(pair):
    pair.own(own_allocations)
    pair.worker(own_allocations)
    job = pair.job([3, 9], [0, 15])
    pair.table.close()
    report, errors, _ = pair.imported(job)
    assert report.failed_blocks == errors == {0, 15}
    assert report.early  # the node may give more at the next try
    until(lambda: SOURCE not in pair.here.tables(), "the end of the mirror")


def test_a_node_that_ends_takes_its_mirrors_along_and_comes_back(pair):
    pair.own(own_allocations)
    pair.worker(own_allocations)
    job = pair.job([3, 9], [0, 15])
    pair.a.stop()
    until(lambda: SOURCE not in pair.here.tables(), "the end of the mirror")
    report, errors, _ = pair.imported(job)
    assert errors == {0, 15}
    assert report.reason
    pair.a.start(pair.b.peer)
    until(lambda: pair.imported(pair.job([3, 9], [0, 15]))[1] == set(), "an import")
    assert torch.equal(pair.caches["layer.1"][15], pair.theirs["layer.1"][9])


def test_without_its_own_agent_an_engine_imports_nothing_and_goes_on(pair):
    pair.own(own_allocations)
    pair.worker(own_allocations)
    job = pair.job([3], [0])
    pair.b.stop()
    report, errors, _ = pair.imported(job)
    assert errors == {0}
    assert report.reason


def test_of_an_agent_that_was_started_again_unseen_the_new_memory_is_read(pair, monkeypatch):
    monkeypatch.setattr("engine.connector.worker.WATCH_SECONDS", 3600.0)
    pair.own(own_allocations)
    pair.worker(own_allocations)
    assert pair.imported(pair.job([3, 9], [0, 15]))[1] == set()
    pair.b.stop()
    pair.table.invalidate([3, 9])
    pair.b.start(pair.a.peer)
    assert pair.imported(pair.job([4, 10], [1, 14]))[1] == set()
    for name, tensor in pair.caches.items():
        assert torch.equal(tensor[1], pair.theirs[name][4])
        assert torch.equal(tensor[14], pair.theirs[name][10])


def test_an_agent_is_not_asked_for_blocks_of_a_mirror_of_another(pair):
    """It would fetch them into its own memory, and the mirror names that of the other."""
    pair.own(own_allocations)
    pair.worker(own_allocations)
    job = pair.job([3, 9], [0, 15])
    mirror = pair.half._peers.tables()[SOURCE]
    mirror.description = msgspec.structs.replace(mirror.description, pid=os.getppid())
    report, errors, _ = pair.imported(job)
    assert errors == {0, 15}
    assert report.early
    assert "it is not the one that mirrored node-a:owner" in report.reason
    assert not pair.b.agent._fetches.counts


def test_an_engine_that_leaves_frees_the_agents_memory(pair):
    pair.own(own_allocations)
    pair.worker(own_allocations)
    job = pair.job([3, 9], [0, 15])
    pair.half.start(StepMetadata(1, (job,)))
    pair.half.fail_all("gone")
    until(lambda: pair.b.agent._fetches.counts["node-a"].fetches == 1)
    until(lambda: pair.b.agent._staging.taken_bytes() == 0)
    pair.worker(own_allocations)  # another engine may have it
    report, errors, _ = pair.imported(pair.job([3, 9], [1, 2]))
    assert (report.failed_blocks, errors) == (frozenset(), set())
    assert torch.equal(pair.caches["layer.1"][2], pair.theirs["layer.1"][9])


def test_where_threads_are_short_a_fetch_fails_and_the_next_comes(pair):
    pair.own(own_allocations)
    pair.worker(own_allocations)
    counts = pair.b.agent._fetches.counts["node-a"]
    with no_threads("peerkv-fetch"):
        report, errors, _ = pair.imported(pair.job([3, 9], [0, 15]))
    assert errors == {0, 15}
    assert "short of threads" in report.reason
    assert (counts.fetches, counts.blocks, counts.failed_blocks) == (1, 0, {"failed": 2})
    assert pair.imported(pair.look_up([3, 9], [1, 14]))[1] == set()
    assert torch.equal(pair.caches["layer.1"][14], pair.theirs["layer.1"][9])
    assert (counts.fetches, counts.blocks, counts.failed_blocks) == (2, 2, {"failed": 2})


def test_what_comes_and_what_does_not_is_counted_and_written_down(pair):
    pair.own(own_allocations)
    pair.worker(own_allocations)
    assert pair.imported(pair.job([3, 9], [0, 15]))[1] == set()
    job = pair.look_up([3, 9], [1, 14])
    pair.table.invalidate([9])
    assert pair.imported(job)[1] == {14}
    until(lambda: read_fetches(pair.b.run).get("node-a", FetchCounts()).fetches == 2, "the counts")
    counts = read_fetches(pair.b.run)["node-a"]
    size = sum(layer.bytes for layer in pair.half._transport.memory().layers)
    assert (counts.blocks, counts.bytes, counts.failed_blocks) == (3, 3 * size, {"changed": 1})
    assert 0 < counts.seconds < 5


def test_an_agent_that_is_stopped_holds_up_one_import_for_2_s_and_no_other(pair, monkeypatch):
    """Its connections are accepted by the kernel, as those of a process that was stopped are, and nobody answers."""
    monkeypatch.setattr("transport.node.fetches._listener", lambda _: os.getpid())
    pair.own(own_allocations)
    pair.worker(own_allocations)
    job = pair.job([3, 9], [0, 15])
    door = pair.b.tables / "node.sock"
    door.rename(door.with_suffix(".away"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stopped:
        stopped.bind(str(door))
        stopped.listen()
        began = time.monotonic()
        report, errors, _ = pair.imported(job)
        assert errors == {0, 15}
        assert (report.early, report.reason) == (True, f"{SOURCE}: this node's agent is silent for 2 s")
        assert 1.9 < time.monotonic() - began < 10
        began = time.monotonic()
        for _ in range(5):
            assert pair.imported(job)[1] == {0, 15}
        assert time.monotonic() - began < 1.5
        stopped.accept()[0].close()  # it goes on, or ends
        door.with_suffix(".away").replace(door)
    assert pair.imported(job)[1] == set()
    assert torch.equal(pair.caches["layer.1"][15], pair.theirs["layer.1"][9])


@contextmanager
def held_up(pair) -> Iterator[threading.Event]:
    """Fetches that do not go on until the event is set; they go on at the end."""
    held, fetch = threading.Event(), BlockClient.fetch

    def slow(self, *asked):
        held.wait(30)
        return fetch(self, *asked)

    until(lambda: pair.way.settled and pair.b.agent._staging.taken_bytes() == 0, "the end of measuring")
    with mock.patch.object(BlockClient, "fetch", slow):
        try:
            yield held
        finally:
            held.set()


def test_an_agent_at_work_on_a_slow_fetch_is_waited_for(pair, monkeypatch):
    monkeypatch.setattr("transport.node.fetches.SILENT_SECONDS", 1.0)
    pair.own(own_allocations)
    pair.worker(own_allocations)
    job = pair.job([3, 9], [0, 15])
    with held_up(pair) as held:
        pair.half.start(StepMetadata(1, (job,)))
        began = time.monotonic()
        until(lambda: pair.half.poll() or time.monotonic() - began > 2, "the time of silence, twice")
        held.set()
        until(pair.half.poll, "the end of the import")
    assert pair.half.take_load_errors() == set()
    assert torch.equal(pair.caches["layer.1"][15], pair.theirs["layer.1"][9])


def test_an_agent_that_ends_amid_a_fetch_logs_no_defect(pair, caplog):
    pair.own(own_allocations)
    pair.worker(own_allocations)
    job = pair.job([3, 9], [0, 15])
    with held_up(pair) as held:
        pair.half.start(StepMetadata(1, (job,)))
        until(lambda: pair.b.agent._staging.taken_bytes() > 0, "the fetch")
        threading.Timer(0.5, held.set).start()  # the end of its loop waits for its threads
        pair.b.stop()
    until(pair.half.poll, "the end of the import")
    assert pair.half.take_load_errors() == {0, 15}
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


def test_how_fast_the_network_is_is_measured_without_nixl_too(pair):
    until(lambda: any(node.way.tcp_bytes_per_second > 0 for node in read_nodes(pair.b.run).nodes), "a measurement")
    until(lambda: pair.b.agent._staging.taken_bytes() == 0, "the memory for it, free again")


def test_a_large_import_comes_over_several_connections(pair, monkeypatch):
    monkeypatch.setattr("engine.node.local_fetch.PART_BYTES_MIN", 800)
    pair.own(own_allocations)
    pair.worker(own_allocations)
    blocks, targets = [3, 9, 4, 10, 11], [0, 15, 7, 8, 9]
    assert pair.imported(pair.job(blocks, targets))[1] == set()
    for name, tensor in pair.caches.items():
        for block, target in zip(blocks, targets, strict=True):
            assert torch.equal(rows(tensor, target), rows(pair.theirs[name], block))
    assert len(pair.b.agent._following["node-a"][0].client.tcp._idle) > 1


def test_an_engine_that_was_too_slow_uses_nothing_of_memory_that_is_no_longer_its_own(pair, monkeypatch):
    monkeypatch.setattr("engine.node.local_fetch.HELD_SECONDS_MAX", 0.2)
    pair.own(own_allocations)
    pair.worker(own_allocations)
    fetches = Fetches(pair.b.tables, 0)
    job = pair.job([3, 9], [0, 15])
    fetches.begin(job, pair.here.tables()[SOURCE])
    ready = []
    until(lambda: ready.extend(fetches.poll()) or ready, "the blocks")
    staged, source, _ = ready[0]
    until(lambda: pair.b.agent._staging.taken_bytes() == 0, "the end of the agent's patience")
    importer = SharedMemoryTransport(own_allocations(), BLOCKS)
    importer.start(staged, source, gently=False)
    results = []
    until(lambda: results.extend(importer.poll()) or results)
    assert set(results[0].failed_blocks) == {0, 15}
    fetches.close()


def test_what_finds_no_room_in_the_agents_memory_is_computed(tmp_path):
    with nodes(tmp_path, "node-a", "node-b", keys=False) as (a, b):
        a.start(b.peer)
        b.start(a.peer, staging_bytes=3 * 768)  # three blocks of three layers
        pair = NodePair(a, b)
        pair.own(own_allocations)
        pair.worker(own_allocations)
        report, errors, _ = pair.imported(pair.job([3, 9, 4, 5, 6], [0, 15, 7, 8, 9]))
        assert errors == {8, 9}
        assert "full" in report.reason or report.failed_blocks == {8, 9}
        assert torch.equal(pair.caches["layer.1"][7], pair.theirs["layer.1"][4])
        pair.close()


def test_memory_of_an_agent_that_ended_cannot_be_opened(tmp_path):
    with nodes(tmp_path, "node-a", keys=False) as (a,):
        a.start(Peer("node-b", "127.0.0.1", 1))
        region = a.agent._staging.region
        map_region(region).close()
        a.stop()
        with pytest.raises(MemoryUnreachable):
            map_region(region)


def test_nodes_find_each_other_in_their_own_names(tmp_path):
    """What node-b calls node-a:owner is not told back to node-a."""
    with nodes(tmp_path, "node-a", "node-b") as (a, b):
        a.start(b.peer)
        b.start(a.peer)
        with closing(writer(a.tables, "owner", BLOCKS)), closing(writer(b.tables, "owner", BLOCKS)):
            theirs, ours = TableDirectory(b.tables), TableDirectory(a.tables)
            until(lambda: theirs.tables().keys() == {"owner", "node-a:owner"})
            until(lambda: ours.tables().keys() == {"owner", "node-b:owner"})
            time.sleep(0.3)
            assert len(theirs.tables()) == len(ours.tables()) == 2
        assert os.path.exists(b.tables / "node.sock")
