"""Every way to read another replica's KV keeps the same contract: what an import delivers is right or reported as failed.

Within a node by shared memory; from another node by TCP and, where it is installed, by NIXL. Imports are an engine's own, over
real KV memory. CUDA IPC needs two GPUs: `tests/gpu`.
"""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.unit.engine.node.imports import NodePair, Pair
from tests.unit.engine.node.two_nodes import nodes
from tests.unit.transport.backends.test_copy import BLOCKS, KEYS, LAYOUTS, own_allocations, rows
from tests.unit.transport.node.nixl_nodes import needs_nixl, over_tcp
from tests.unit.waiting import until


@pytest.fixture(scope="module", params=["shared memory", "tcp", pytest.param("nixl", marks=needs_nixl)])
def made(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Pair]]:
    """What makes a pair: of nodes that are started once, where it takes two."""
    path = tmp_path_factory.mktemp("nodes")
    if request.param == "shared memory":
        yield lambda: Pair(path, path, "owner")
        return
    with over_tcp(), nodes(path, "node-a", "node-b") as (a, b):
        a.start(b.peer, transport=request.param)
        b.start(a.peer, transport=request.param)
        until(lambda: (way := NodePair(a, b).way) is not None and way.told.transport == request.param, request.param)
        yield lambda: NodePair(a, b)
        way = NodePair(a, b).way
        assert (way.told.transport, way.settled or request.param == "tcp") == (request.param, True)
        until(lambda: b.agent._staging.taken_bytes() == 0, "the agent's memory, free again")


@pytest.fixture
def pair(made: Callable[[], Pair]) -> Iterator[Pair]:
    pair = made()
    yield pair
    pair.close()
    until(lambda: pair.source not in pair.here.tables(), "the end of the owner")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("blocks", "targets"), [([3, 9, 4, 10, 11], [0, 15, 7, 8, 9]), ([1], [1])])
def test_an_import_copies_exactly_the_blocks_asked_for(pair, layout, blocks, targets):
    pair.own(layout)
    pair.worker(layout)
    before = {name: tensor.clone() for name, tensor in pair.caches.items()}
    report, errors, _ = pair.imported(pair.job(blocks, targets))
    assert (report.failed_blocks, report.reason, errors) == (frozenset(), "", set())
    moved = dict(zip(targets, blocks, strict=True))
    for name, tensor in pair.caches.items():
        for block in range(BLOCKS):
            expected = rows(pair.theirs[name], moved[block]) if block in moved else rows(before[name], block)
            assert torch.equal(rows(tensor, block), expected)
    assert report.bytes == sum(rows(t, 0).numel() * t.element_size() for t in pair.caches.values()) * len(blocks)


def test_blocks_of_each_group_are_copied_in_that_groups_layers_alone(pair):
    """Layers of different groups lie over the same memory, as in vLLM."""
    groups = {"layer.0": 0, "layer.1": 1, "layer.2": 1, "again": 1}

    def overlaid():
        whole = torch.zeros(2, BLOCKS, 2, 4, 8)
        return {"layer.0": whole[0], "layer.1": whole[0], "layer.2": whole[1], "again": whole[1]}

    pair.own(overlaid, groups)
    pair.worker(overlaid, groups)
    for tensor in pair.caches.values():
        tensor.zero_()
    report, _, failed = pair.imported(pair.job([3, 9, 4], [0, 15, 7], (1, 2)))
    block = 2 * 4 * 8 * 4
    assert (report.failed_blocks, report.bytes, failed) == (frozenset(), block * (1 + 2 * 2), set())
    assert torch.equal(pair.caches["layer.0"][0], pair.theirs["layer.0"][3])
    assert not pair.caches["layer.2"][0].any()
    for target, source in ((15, 9), (7, 4)):
        assert torch.equal(pair.caches["layer.1"][target], pair.theirs["layer.1"][source])
        assert torch.equal(pair.caches["layer.2"][target], pair.theirs["layer.2"][source])


@pytest.mark.parametrize("again", [False, True])
def test_a_block_reallocated_since_the_look_up_is_reported_as_failed(pair, again):
    pair.own(own_allocations)
    pair.worker(own_allocations)
    job = pair.job([3, 9, 4], [0, 15, 7])
    pair.table.invalidate([9])
    if again:
        pair.table.publish([9], KEYS[1:2])
    report, errors, _ = pair.imported(job)
    assert (report.failed_blocks, errors) == ({15}, {15})
    assert "reallocated" in report.reason
    assert torch.equal(pair.caches["layer.2"][7], pair.theirs["layer.2"][4])


def test_of_an_owner_that_overwrites_all_the_time_no_wrong_block_is_used(pair):
    """Even blocks are overwritten, odd ones stay; what counts as imported is of one moment in all layers."""
    pair.own(own_allocations)
    pair.worker(own_allocations)
    blocks = list(range(8))
    pair.table.publish(blocks, KEYS[: len(blocks)])
    stop = threading.Event()

    def overwrite() -> None:
        value = 200.0
        while not stop.is_set():
            for block in blocks[::2]:
                pair.table.invalidate([block])
                for cache in pair.theirs.values():
                    cache[block] = value
                pair.table.publish([block], KEYS[block : block + 1])
            value += 1
            time.sleep(0.002)

    thread = threading.Thread(target=overwrite)
    thread.start()
    came = 0
    try:
        until(lambda: pair.source in pair.here.tables(), "a table")
        for _ in range(20):
            until(lambda: len(pair.here.tables()[pair.source].longest_run(KEYS)) == len(blocks), "all blocks at a time")
            try:
                job = pair.look_up(blocks, blocks)
            except ValueError:  # a block was being overwritten: there are fewer than targets
                continue
            if len(job) != len(blocks):
                continue
            report, errors, _ = pair.imported(job)
            assert set(report.failed_blocks) == errors
            for block in set(blocks) - errors:
                content = torch.cat([cache[block].flatten() for cache in pair.caches.values()])
                if block % 2:
                    assert torch.equal(content, torch.cat([cache[block].flatten() for cache in pair.theirs.values()]))
                    came += 1
                else:
                    assert bool((content == content[0]).all()) or float(content.max()) < 100
    finally:
        stop.set()
        thread.join()
    assert came


def test_an_owner_that_ended_fails_the_whole_import(pair):
    pair.own(own_allocations)
    pair.worker(own_allocations)
    assert pair.imported(pair.job([3, 9], [0, 15]))[1] == set()
    job = pair.look_up([3, 9], [0, 15])
    pair.table.close()
    report, errors, _ = pair.imported(job)
    assert report.failed_blocks == errors == {0, 15}
    assert report.reason


def test_memory_of_another_shape_is_refused(pair):
    pair.own(own_allocations)
    pair.worker(LAYOUTS[0])
    report, errors, _ = pair.imported(pair.job([3], [0]))
    assert errors == {0}
    assert "other sizes" in report.reason
