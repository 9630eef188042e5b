"""Every way to fetch blocks from another node keeps the same contract: a block that it calls good is right.

Whatever the owner does. What belongs to one way alone is tested beside it.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from engine.tiers.slots import cut
from tests.unit.transport.node.nixl_nodes import needs_namespaces, needs_nixl
from tests.unit.transport.node.owners import BLOCKS, KEYS, Owner, loose, question
from tests.unit.transport.table_fixtures import writer
from transport.backends.shared_memory import SharedMemoryTransport, checksum, map_region, region_of
from transport.node.block_client import BlockClient
from transport.node.block_fetcher import BlockFetcher, Fetched
from transport.node.block_server import BlockServer, Offers
from transport.node.keys import client_context, make_keys, server_context
from transport.node.messages import BLOCKS_ASKED_MAX, PROBE, PROBE_BLOCK_BYTES, NodeError
from transport.node.nixl.ability import NO_NIXL, Ability
from transport.node.staging import Piece
from transport.table.directory import TableDirectory
from transport.table.layout import CHECKSUM_BYTES

UNTOUCHED = 0xEE
BEYOND = 5


@dataclass
class Way:
    """How node-b fetches from node-a: what a BlockServer there is given, a fetcher for its port, memory to fetch into."""

    context: object
    offers: Offers | Ability
    fetcher_for: Callable[[int], BlockFetcher]
    take: Callable[[int, int], Piece]

    def target(self, count: int, size: int) -> Piece:
        piece = self.take(count, size + BEYOND)
        piece.rows[:] = UNTOUCHED
        return piece


@pytest.fixture(
    params=[
        "tcp",
        "tcp with keys",
        pytest.param("nixl", marks=needs_nixl),
        pytest.param("nixl between namespaces", marks=[needs_nixl, needs_namespaces]),
    ]
)
def way(request, tmp_path) -> Way:
    def tcp(port: int, context=None, version="") -> BlockClient:
        return BlockClient("node-a", ("127.0.0.1", port), context, "node-b", "test", version)

    def loose_target(count: int, size: int) -> Piece:
        return loose(np.empty((count, size), np.uint8))

    if request.param == "tcp":
        return Way(None, NO_NIXL, tcp, loose_target)
    if request.param == "tcp with keys":
        made = make_keys(tmp_path / "keys", ["node-a", "node-b"])
        return Way(server_context(made[0]), NO_NIXL, lambda port: tcp(port, client_context(made[1])), loose_target)
    pair = request.getfixturevalue("nixl" if request.param == "nixl" else "nixl_apart")

    def staged(count: int, size: int) -> Piece:
        piece = pair.staging.take(count, size)
        request.addfinalizer(lambda: pair.staging.give_back(piece))
        return piece

    return Way(None, pair.a.owner, lambda port: pair.b.client(tcp(port, None, pair.b.found.version)), staged)


@pytest.fixture
def owner(tmp_path, way) -> Iterator[Owner]:
    made = Owner(tmp_path / "tables", way.context, way.offers)
    yield made
    made.close()


@pytest.fixture
def fetcher(owner, way) -> Iterator[BlockFetcher]:
    made = way.fetcher_for(owner.server.port)
    yield made
    made.close()


@contextmanager
def serving(path, way: Way) -> Iterator[BlockFetcher]:
    """What fetches from a node with the tables in `path`."""
    server = BlockServer(path, "node-a", ("127.0.0.1", 0), way.context, "test", way.offers)
    server.start()
    fetcher = way.fetcher_for(server.port)
    try:
        yield fetcher
    finally:
        fetcher.close()
        server.close()


def fetched(fetcher: BlockFetcher, asked, size: int, target: Piece) -> Fetched:
    """What came; nothing, where the way could not be gone."""
    count = len(asked.ids) // 4
    try:
        return fetcher.fetch(asked, [size] * count, target)
    except NodeError as error:
        return Fetched(np.zeros(count, np.bool_), str(error))


def test_blocks_come_as_they_are_in_the_order_that_was_asked_for(owner, fetcher, way):
    for blocks in ([3, 9, 4, 60], [7, 8, 9, 10], [0, BLOCKS - 1, 5, 5]):
        target = way.target(4, owner.bytes)
        came = fetcher.fetch(owner.asked(blocks), [owner.bytes] * 4, target)
        assert (came.good.tolist(), came.reason) == ([True] * 4, "")
        assert [row[:-BEYOND].tobytes() for row in target.rows] == [owner.block(block) for block in blocks]
        assert (target.rows[:, -BEYOND:] == UNTOUCHED).all()


def test_a_block_that_was_reallocated_since_the_look_up_is_not_good(owner, fetcher, way):
    asked = owner.asked([3, 9, 4])
    owner.table.invalidate([9])
    owner.table.publish([9], KEYS[9:10])  # even the same key again: it may have been written meanwhile
    target = way.target(3, owner.bytes)
    came = fetcher.fetch(asked, [owner.bytes] * 3, target)
    assert came.good.tolist() == [True, False, True]
    assert "reallocated" in came.reason
    assert target.rows[2, :-BEYOND].tobytes() == owner.block(4)


def test_of_an_owner_that_overwrites_all_the_time_no_wrong_block_is_good(owner, fetcher, way):
    stop = threading.Event()

    def overwrite() -> None:
        value = 100
        while not stop.is_set():
            for block in range(0, BLOCKS, 2):
                owner.table.invalidate([block])
                for cache in owner.caches.values():
                    cache[block] = value
                owner.table.publish([block], KEYS[block : block + 1])
            value = 100 + (value - 99) % 100
            time.sleep(0.0005)

    thread = threading.Thread(target=overwrite)
    thread.start()
    came = 0
    target = way.target(BLOCKS, owner.bytes)
    try:
        for _ in range(60):
            told = fetched(fetcher, owner.asked(range(BLOCKS)), owner.bytes, target)
            for block in range(1, BLOCKS, 2):
                assert told.good[block]
                assert target.rows[block, :-BEYOND].tobytes() == owner.block(block)
            for block in range(0, BLOCKS, 2):
                if told.good[block]:
                    came += 1
                    content = target.rows[block, :-BEYOND]
                    assert len(set(content.tolist())) == 1 or content.max() < 100  # of one moment
    finally:
        stop.set()
        thread.join()
    assert came


@pytest.mark.parametrize("change", [{"name": "nobody"}, {"epoch": 1}, {"rank": 7}, {"name": "node-c:owner"}])
def test_of_what_is_not_here_nothing_is_good(owner, fetcher, way, change):
    came = fetched(fetcher, owner.asked([1], **change), owner.bytes, way.target(1, owner.bytes))
    assert not came.good.any()
    assert came.reason
    assert fetched(fetcher, owner.asked([1]), owner.bytes, way.target(1, owner.bytes)).good.all()


@pytest.mark.parametrize(
    "change",
    [
        {"states": b"12345678" * 2},
        {"states": b"1234567"},
        {"ids": b"\xff\xff\xff\x7f"},
        {"ids": b"\1\0\0\0\0"},
        {"ids": b"\0" * 4 * (BLOCKS_ASKED_MAX + 1), "states": b"\0" * 8 * (BLOCKS_ASKED_MAX + 1)},
        {"counts": (5,)},
        {"counts": (-1, 2)},
        {"counts": (0, 1)},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_question_that_cannot_be_is_an_error_and_the_next_is_answered(owner, fetcher, way, change):
    assert fetcher.fetch(owner.asked([1]), [owner.bytes], way.target(1, owner.bytes)).good.all()
    with pytest.raises(NodeError):
        fetcher.fetch(owner.asked([1], **change), [owner.bytes], way.target(1, owner.bytes))
    assert fetcher.fetch(owner.asked([1]), [owner.bytes], way.target(1, owner.bytes)).good.all()


@pytest.mark.parametrize("size", [8, 200])
def test_blocks_of_another_size_than_they_have_are_not_taken(owner, fetcher, way, size):
    with pytest.raises(NodeError):
        fetcher.fetch(owner.asked([1, 2]), [size] * 2, way.target(2, owner.bytes))


def test_an_owner_that_ended_vouches_for_nothing(owner, fetcher, way):
    asked, target = owner.asked([1, 2]), way.target(2, owner.bytes)
    assert fetcher.fetch(asked, [owner.bytes] * 2, target).good.all()
    owner.table.close()
    assert not fetched(fetcher, asked, owner.bytes, target).good.any()
    owner.server.sweep()
    assert not fetched(fetcher, asked, owner.bytes, target).good.any()


def test_memory_that_was_let_go_of_while_it_was_read_gives_no_good_block(owner, fetcher, way):
    """Its addresses read as zeros then, whatever its table says."""
    asked, target = owner.asked([1, 2]), way.target(2, owner.bytes)
    assert fetcher.fetch(asked, [owner.bytes] * 2, target).good.all()
    if isinstance(way.offers, Ability):
        pytest.skip("memory is read by the node that maps it")
    way.offers.drop([("owner", owner.reader.epoch, 0)])
    assert not fetched(fetcher, asked, owner.bytes, target).good.any()
    assert fetched(fetcher, asked, owner.bytes, target).good.all()  # it is offered anew
    assert [row[:-BEYOND].tobytes() for row in target.rows] == [owner.block(1), owner.block(2)]


def test_a_stopped_engine_serves_as_before_and_a_killed_one_no_more(tmp_path, way):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        caches = {"layer": torch.arange(BLOCKS * 64, dtype=torch.int32).reshape(BLOCKS, 64)}
        table = writer(tmp_path, "owner", BLOCKS, memories=(SharedMemoryTransport(caches, BLOCKS).memory(),))
        table.publish(range(BLOCKS), KEYS)
        os.write(tell, b"x")
        signal.pause()
        os._exit(0)
    assert os.read(told, 1) == b"x"
    with serving(tmp_path, way) as fetcher:
        os.kill(child, signal.SIGSTOP)
        asked = question(TableDirectory(tmp_path).tables()["owner"], range(BLOCKS))
        target = way.target(BLOCKS, 256)
        assert fetcher.fetch(asked, [256] * BLOCKS, target).good.all()
        content = np.ascontiguousarray(target.rows[:, :256]).view(np.int32)
        assert (content.reshape(-1) == np.arange(BLOCKS * 64)).all()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        begun = time.monotonic()
        assert not fetched(fetcher, asked, 256, target).good.any()
        assert time.monotonic() - begun < 1


def test_blocks_of_several_groups_come_in_that_groups_layers(tmp_path, way):
    groups = {"layer.0": 0, "layer.1": 1, "layer.2": 1}
    whole = torch.randint(0, 99, (2, 8, 40), dtype=torch.uint8)
    caches = {"layer.0": whole[0], "layer.1": whole[0], "layer.2": whole[1]}
    table = writer(tmp_path, "owner", 8, memories=(SharedMemoryTransport(caches, 8, groups=groups).memory(),))
    table.publish(range(8), KEYS[:8])
    asked = question(TableDirectory(tmp_path).tables()["owner"], [3, 6, 1], counts=(1, 2))
    target = way.target(3, 80)
    with serving(tmp_path, way) as fetcher:
        assert fetcher.fetch(asked, [40, 80, 80], target).good.all()
    shared = [caches[name].numpy() for name in sorted(caches)]
    assert (target.rows[0, :40] == shared[0][3]).all()
    assert (target.rows[0, 40:] == UNTOUCHED).all()
    for place, block in ((1, 6), (2, 1)):
        assert (target.rows[place, :80] == np.concatenate([shared[1][block], shared[2][block]])).all()
    table.close()


def test_host_memory_that_is_damaged_is_not_good(tmp_path, way):
    caches = {"layer": torch.randint(0, 99, (8, 64), dtype=torch.uint8)}
    own = SharedMemoryTransport(caches, 8).memory()
    fd = os.memfd_create("slots")
    os.ftruncate(fd, 4096)
    slots = cut(region_of(fd, 4096), own, 1)
    memory = map_region(slots.memory.regions[0], writable=True)
    table = writer(tmp_path, "tier", slots.count, memories=(slots.memory,))
    sums = slots.memory.checksums
    for slot in range(4):
        begin, said = slot * sums.stride, sums.offset + slot * sums.stride
        memory[begin : begin + 64] = caches["layer"][slot].numpy().tobytes()
        memory[said : said + CHECKSUM_BYTES] = checksum(memoryview(memory)[begin : begin + 64], KEYS[slot].tobytes())
    table.publish(range(4), KEYS[:4])
    memory[2 * sums.stride] ^= 1
    target = way.target(4, 64)
    with serving(tmp_path, way) as fetcher:
        came = fetcher.fetch(question(TableDirectory(tmp_path).tables()["tier"], range(4)), [64] * 4, target)
    assert came.good.tolist() == [True, True, False, True]
    assert (target.rows[3, :64] == caches["layer"][3].numpy()).all()
    table.close()


def test_more_than_is_read_at_a_time_comes_in_several(tmp_path, way):
    blocks, size = 24, 400_000
    caches = {"layer": torch.randint(0, 99, (blocks, size), dtype=torch.uint8)}
    table = writer(tmp_path, "owner", blocks, memories=(SharedMemoryTransport(caches, blocks).memory(),))
    table.publish(range(blocks), KEYS[:blocks])
    target = way.target(blocks, size)
    asked = question(TableDirectory(tmp_path).tables()["owner"], range(blocks))
    with serving(tmp_path, way) as fetcher:
        assert fetcher.fetch(asked, [size] * blocks, target).good.all()
    assert (target.rows[:, :size] == caches["layer"].numpy()).all()
    table.close()


def test_the_blocks_for_measuring_come(owner, fetcher, way):
    target = way.target(3, PROBE_BLOCK_BYTES)
    asked = owner.asked([0, 1, 2], name=PROBE, epoch=0)
    assert fetcher.fetch(asked, [PROBE_BLOCK_BYTES] * 3, target).good.all()
    assert not target.rows[:, :-BEYOND].any()


def test_a_node_that_is_gone_is_an_error_in_time(owner, fetcher, way):
    target = way.target(1, owner.bytes)
    assert fetcher.fetch(owner.asked([1]), [owner.bytes], target).good.all()
    owner.server.close()
    begun = time.monotonic()
    with pytest.raises(NodeError):
        fetcher.fetch(owner.asked([1]), [owner.bytes], target)
    assert time.monotonic() - begun < 2


def test_a_fetcher_that_was_closed_fetches_no_more(owner, fetcher, way):
    fetcher.close()
    with pytest.raises(NodeError):
        fetcher.fetch(owner.asked([1]), [owner.bytes], way.target(1, owner.bytes))
