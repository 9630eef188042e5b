"""Blocks of a GPU reach another node by way of the host memory of their own, stored when somebody asks for them."""

from collections.abc import Callable, Iterator
from contextlib import closing

import msgspec
import numpy as np
import pytest

from tests.unit.transport.node.devices import BLOCKS, SLOTS, Device
from tests.unit.transport.node.owners import KEYS, loose, question
from tests.unit.transport.table_fixtures import writer
from transport.node.block_client import BlockClient
from transport.node.block_copy import OwnerMemory
from transport.node.block_server import BlockServer
from transport.node.changes import NOT_READABLE, Changes
from transport.node.messages import MemoryAsked, NodeError, TableClosed, TableOpened
from transport.node.stored_blocks import StoredBlocks
from transport.table.directory import TableDirectory
from transport.table.layout import Coded
from transport.table.quality import CODED, IN_CODE, LOSSY
from transport.table.reader import TableReader


class Storing:
    """Does at once what an engine does with its next steps."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.asked: list[list[int]] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def store(self, replica: str, missing) -> None:
        assert replica == "owner"
        if wanted := missing():
            self.asked.append(list(wanted))
            self.device.store(wanted)
        self.meanwhile()


@pytest.fixture
def device(tmp_path) -> Iterator[Device]:
    made = Device(tmp_path)
    yield made
    made.close()


@pytest.fixture
def storing(device) -> Storing:
    return Storing(device)


@pytest.fixture
def server(tmp_path, storing) -> Iterator[BlockServer]:
    made = BlockServer(tmp_path, "node-a", ("127.0.0.1", 0), None, "test", storing=storing)
    made.start()
    yield made
    made.close()


@pytest.fixture
def client(server) -> Iterator[BlockClient]:
    made = BlockClient("node-a", ("127.0.0.1", server.port), None, "node-b", "test")
    yield made
    made.close()


@pytest.fixture
def fetched(tmp_path, device, client):
    """Fetches blocks as they were looked up; returns which came, after having compared them."""
    directory = TableDirectory(tmp_path, hold_seconds=0)

    def fetch(blocks, asked=None):
        target = loose(device.rows(len(blocks)))
        asked = asked or question(directory.tables()["owner"], blocks)
        found = client.fetch(asked, [device.bytes] * len(blocks), target)
        for place in np.flatnonzero(found.good):
            assert target.rows[place, : device.bytes].tobytes() == device.block(blocks[place])
        return found.good.tolist()

    yield fetch
    directory.close()


def test_what_is_not_in_host_memory_is_stored_there_and_sent(fetched, storing, device):
    device.store([4])
    assert fetched([3, 4, 9, 5]) == [True] * 4
    assert storing.asked == [[3, 9, 5]]
    assert fetched([9, 3]) == [True] * 2  # and there it is now
    assert storing.asked == [[3, 9, 5]]


def test_what_was_reallocated_before_it_was_asked_for_is_neither_stored_nor_sent(fetched, storing, device, tmp_path):
    directory = TableDirectory(tmp_path)
    asked = question(directory.tables()["owner"], [3, 4])
    device.table.invalidate([3])
    device.table.publish([3], KEYS[-1:])
    assert fetched([3, 4], asked) == [False, True]
    assert storing.asked == [[4]]
    directory.close()


def test_what_its_engine_does_not_store_does_not_come(fetched, storing, device):
    device.store([4])
    storing.store = lambda replica, missing: missing()
    assert fetched([3, 4]) == [False, True]


def test_what_gives_way_in_host_memory_before_it_is_read_does_not_come(fetched, storing, device):
    storing.meanwhile = lambda: device.tier.invalidate([0])
    assert fetched([3, 4]) == [False, True]


def test_of_a_long_prefix_no_more_is_stored_than_keeps_in_host_memory(fetched, storing):
    blocks = list(range(BLOCKS - 1))
    assert fetched(blocks) == [True] * (SLOTS // 2) + [False] * (len(blocks) - SLOTS // 2)
    assert storing.asked == [blocks[: SLOTS // 2]]


def test_where_blocks_that_are_not_coded_take_more_room_fewer_are_stored(device, tmp_path):
    coded = Coded(region=0, offset=0, stride=64, bytes=64, shape="00", whole=4)
    kept = msgspec.structs.replace(device.kept, coded=coded)
    made = writer(tmp_path, "of.coded", SLOTS, transport="cuda_ipc", memories=(kept,))
    with closing(made), closing(TableReader(device.table.path)) as owner, closing(TableReader(made.path)) as tier:
        stored = StoredBlocks(owner, [(tier, OwnerMemory(tier, 0))], question(owner, range(BLOCKS - 1)))
        assert stored.missing() == list(range(SLOTS // 4 // 2))


@pytest.mark.parametrize("quality", [LOSSY | CODED | IN_CODE, LOSSY | CODED])
def test_what_lost_something_in_host_memory_is_not_taken_for_the_engines(fetched, storing, device, quality):
    device.store([3], quality)
    assert fetched([3, 4]) == [False, True]
    assert storing.asked == [[4]]  # the engine stores nothing twice


def test_blocks_in_another_replicas_host_memory_are_sent_from_there(fetched, storing, device, tmp_path):
    other = Device(tmp_path, "other")
    for name, cache in other.device.items():
        cache.copy_(device.device[name])
    other.store([9])
    assert fetched([3, 9, 5]) == [True] * 3
    assert storing.asked == [[3, 5]]
    other.close()


def test_host_memory_of_another_model_is_not_looked_at(fetched, storing, device, tmp_path):
    other = writer(tmp_path, "other.host-memory", SLOTS, fields={"weights": "w2"}, memories=(device.kept,))
    other.publish([0], KEYS[3:4])
    assert fetched([3]) == [True]
    assert storing.asked == [[3]]
    other.close()


def test_such_memory_is_not_offered_to_nixl(client, device, tmp_path):
    offered = client.ask(MemoryAsked("owner", TableDirectory(tmp_path).tables()["owner"].epoch, 0))
    assert not offered.layers


def test_an_engine_that_cannot_be_asked_sends_nothing_and_says_why(fetched, storing):
    def refuse(replica, missing):
        raise NodeError(f"{replica} takes no requests")

    storing.store = refuse
    assert fetched([3, 4]) == [False, False]


def test_other_nodes_are_told_that_a_gpus_blocks_can_be_fetched_once_it_has_host_memory(tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    directory, changes = TableDirectory(alone, hold_seconds=0), Changes()
    device = Device(alone)
    (alone / "owner.host-memory.table").rename(tmp_path / "away")

    def opened():
        told = {each.name: each for each in changes.round(directory.tables()) if isinstance(each, TableOpened)}
        return {name: (each.status, len(each.memories)) for name, each in told.items()}

    assert opened() == {"owner": (NOT_READABLE, 0)}
    assert opened() == {}
    (tmp_path / "away").rename(alone / "owner.host-memory.table")
    assert opened() == {"owner": ("ok", 1), "owner.host-memory": ("ok", 1)}
    assert opened() == {}
    device.tier.close()
    told = list(changes.round(directory.tables()))
    assert any(isinstance(each, TableClosed) and each.name == "owner.host-memory" for each in told)
    assert [(each.status, each.memories) for each in told if isinstance(each, TableOpened)] == [(NOT_READABLE, ())]
    device.table.close()
    directory.close()
