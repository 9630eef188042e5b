"""Blocks that lie coded in host memory, of callers who accept loss, reach other nodes decoded, and are known to have lost."""

from collections.abc import Iterator
from contextlib import closing
from typing import get_args

import numpy as np
import pytest

from engine.connector.worker import WorkerHalf
from engine.tiers.stores import Store
from tests.unit.engine.node.imports import NodePair
from tests.unit.engine.node.two_nodes import nodes
from tests.unit.engine.tiers.test_coded_slots import BITS, BLOCKS, KEYS, SHAPE, Tier, caches, content, key, restored, with_coded
from tests.unit.transport.node.owners import loose, question
from tests.unit.waiting import until
from transport.backends.base import ImportJob
from transport.backends.shared_memory import map_region
from transport.frames.codecs import compile_codec
from transport.node.block_client import BlockClient
from transport.node.block_copy import OwnerMemory, checked
from transport.node.block_server import BlockServer
from transport.node.decoding import CodedMemory, Decoder
from transport.node.messages import NodeError
from transport.node.nixl.client import NixlClient
from transport.table.layout import Memory, SlotCodec
from transport.table.quality import LOSSY, QUALITY
from transport.table.reader import TableReader

NAME = "r.host-memory"


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Where numba has never compiled these loops it takes longer than a test waits."""
    for codec in get_args(SlotCodec):
        compile_codec(codec)


@pytest.fixture
def tier(tmp_path) -> Iterator[Tier]:
    """Three blocks: two that lie coded, and between them one as it was."""
    tables = tmp_path / "node-a" / "tables"
    tables.mkdir(parents=True)
    made = Tier(tables)
    made.store(Store(1, 2, 0, key(0), BITS), Store(2, 4, 0, key(1), LOSSY), Store(6, 3, 0, key(2), BITS))
    made.table.publish([2, 4, 3], KEYS[:3], np.array([BITS, LOSSY, BITS], np.uint64))
    yield made
    made.writer.close()


@pytest.fixture
def reader(tier) -> Iterator[TableReader]:
    with closing(TableReader(tier.table.path)) as made:
        yield made


@pytest.fixture
def server(tier) -> Iterator[BlockServer]:
    made = BlockServer(tier.table.path.parent, "node-a", ("127.0.0.1", 0), None, "test")
    made.start()
    yield made
    made.close()


@pytest.fixture
def client(server) -> Iterator[BlockClient]:
    made = BlockClient("node-a", ("127.0.0.1", server.port), None, "node-b", "test")
    yield made
    made.close()


def ready(server: BlockServer) -> None:
    """As the agent does twice a second, until numba has compiled."""
    until(lambda: server.sweep() or server._decoder.ready, "the decoder")


def fetched(client: BlockClient, reader: TableReader, slots: list[int]) -> tuple[list[bool], np.ndarray]:
    target = loose(np.zeros((len(slots), SHAPE.nbytes), np.uint8))
    found = client.fetch(question(reader, slots), [SHAPE.nbytes] * len(slots), target)
    return found.good.tolist(), target.rows


def expected(tier: Tier) -> list[np.ndarray]:
    """What the blocks are once they are decoded, in the order of their keys."""
    return [restored(tier.before[1]), tier.before[2], restored(tier.before[6])]


def test_they_are_decoded_before_they_are_sent(tier, reader, server, client):
    ready(server)
    good, rows = fetched(client, reader, [2, 4, 3])
    assert good == [True] * 3
    for row, block in zip(rows, expected(tier), strict=True):
        assert (row == block).all()


def test_until_numba_has_compiled_they_do_not_come(reader, server, client, monkeypatch):
    monkeypatch.setattr(Decoder, "ready", False)
    assert fetched(client, reader, [2, 4, 3])[0] == [False, True, False]


def test_one_that_is_damaged_or_was_overwritten_does_not_come(tier, reader, server, client):
    ready(server)
    asked = question(reader, [2, 4, 3])
    tier.damage(2)
    tier.table.invalidate([3])
    tier.table.publish([3], KEYS[2:3], BITS)
    target = loose(np.zeros((3, SHAPE.nbytes), np.uint8))
    assert client.fetch(asked, [SHAPE.nbytes] * 3, target).good.tolist() == [False, True, False]
    assert not target.rows[[0, 2]].any()


def test_by_nixl_which_would_read_the_code_they_are_neither_asked_for_nor_vouched_for(reader, client):
    asked = question(reader, [2, 4, 3])
    with pytest.raises(NodeError, match="coded"):
        NixlClient(client, None).fetch(asked, [SHAPE.nbytes] * 3, loose(np.zeros((3, SHAPE.nbytes), np.uint8)))
    assert list(checked(reader, OwnerMemory(reader, 0), asked).good) == [0, 1, 0]


def test_a_replica_on_another_node_imports_them_and_knows_that_they_lost_something(tier, tmp_path):
    with nodes(tmp_path / "agents", "node-a", "node-b") as (a, b):
        a.tables.rmdir()
        a.tables.symlink_to(tier.table.path.parent)
        a.start(b.peer)
        b.start(a.peer)
        with closing(NodePair(a, b)) as pair:
            pair.source = f"node-a:{NAME}"
            until(lambda: pair.source in pair.here.tables(), "the mirror")
            mirror = pair.here.tables()[pair.source]
            until(lambda: len(mirror.longest_run(KEYS[:3])) == 3, "its blocks")
            run = mirror.longest_run(KEYS[:3])
            assert [int(state) & QUALITY for state in run.states] == [BITS, LOSSY, BITS]
            targets = np.array([7, 1, 4], np.int32)
            job = ImportJob("r", mirror.name, mirror.epoch, run.block_ids, run.states, targets, ())
            importer(pair)
            until(lambda: pair.imported(job)[1] == set(), "an import, once numba has compiled")
            for target, block in zip(targets.tolist(), expected(tier), strict=True):
                assert (content(pair.caches, target) == block).all()


def importer(pair: NodePair) -> None:
    """An engine's worker on node-b, with blocks of that shape."""
    pair.caches = caches()
    pair.half = WorkerHalf(pair.importer_tables, "importer", 0)
    pair.half.register(pair.caches, BLOCKS)
    pair.closing.append(pair.half.close)


def test_what_a_gpu_stored_has_no_checksums_and_is_decoded_all_the_same(tier, reader):
    memory = with_coded(reader.memories[0], checksum=-1)
    plain = Memory(memory.rank, memory.transport, memory.regions, memory.layers, None, memory.coded)
    decoder = Decoder()
    decoder.prepare()
    until(lambda: decoder.ready, "the decoder")
    found = CodedMemory(reader, plain, (map_region(plain.regions[0]),), decoder)
    rows, ids = np.zeros((2, SHAPE.nbytes), np.uint8), np.array([2, 3])
    assert found.decode(reader, ids, rows, np.array([0, 1])).all()
    assert (rows[0] == expected(tier)[0]).all()
    assert (rows[1] == expected(tier)[2]).all()
