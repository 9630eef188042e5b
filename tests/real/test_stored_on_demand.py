"""What another node wants of a GPU: a real engine stores the blocks in host memory when it is asked, idle or busy.

The engine is a CPU's, whose KV memory this process could read: the server of blocks is told that it cannot.
"""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from engine.fleet import FileFleet
from engine.node.on_demand import OnDemand
from tests.real.conftest import CONFIG, ONE, VLLM_ARGS, running
from tests.real.fleet import Fleet
from tests.real.prompts import Words
from tests.real.small_caches import LENGTH
from tests.unit.transport.node.owners import loose, question
from transport.keys import chain_keys, root_key
from transport.node.block_client import BlockClient
from transport.node.block_copy import OwnerMemory
from transport.node.block_server import BlockServer
from transport.table.reader import TableReader
from transport.table.tiers import host_memory_of

REPLICA = "replica-0"


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Its host memory has some twenty slots for each replica, and its KV caches have room for much more."""
    with running(Fleet(CONFIG, ("--host-memory", "64MiB"), VLLM_ARGS, ONE.api_key.get_secret_value())) as made:
        yield made


@pytest.fixture
def client(fleet, monkeypatch) -> Iterator[BlockClient]:
    monkeypatch.setattr("transport.node.block_server.readable", lambda owner: False)
    monkeypatch.setattr("engine.node.on_demand.STORE_SECONDS_MAX", 20.0)  # a busy machine's engine takes its time
    monkeypatch.setattr("transport.node.sockets.PROGRESS_SECONDS", 30.0)
    demand = OnDemand(FileFleet(fleet.run_dir).snapshot)
    server = BlockServer(fleet.table_dir, "node-a", ("127.0.0.1", 0), None, "test", storing=demand)
    server.start()
    made = BlockClient("node-a", ("127.0.0.1", server.port), None, "node-b", "test")
    yield made
    made.close()
    server.close()


def fetched_as_the_engine_has_them(client: BlockClient, table: TableReader, blocks: np.ndarray) -> None:
    """Fetch blocks, all of which come, and compare them with the engine's own."""
    memory = OwnerMemory(table, 0)
    size = memory.block_bytes(0)
    target = loose(np.zeros((len(blocks), size), np.uint8))
    found = client.fetch(question(table, blocks), [size] * len(blocks), target)
    assert found.good.all(), found.reason
    assert (target.rows == memory.copied(blocks.astype(np.int64), 0)).all()
    assert target.rows.any(axis=1).all()


def look_up(fleet: Fleet, ids: list[int], name: str = REPLICA) -> tuple[np.ndarray, np.ndarray]:
    with closing(fleet.table(name)) as table:
        keys = chain_keys(root_key(table.fingerprint), ids, table.block_size, table.hash_name)
        held, blocks, _ = table.look_up(keys)
        return held, blocks[held]


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_real_engine_stores_what_another_node_asks_for(fleet, client, busy):
    ids = Words(fleet.model_dir).ids(LENGTH)
    fleet.direct(REPLICA, ids)  # past the gateway, without a salt
    held, blocks = look_up(fleet, ids)
    assert held.all()
    assert len(blocks) == LENGTH // 32
    assert not look_up(fleet, ids, host_memory_of(REPLICA))[0].all()
    with closing(fleet.table(REPLICA)) as table:
        if busy:
            with fleet.decoding(["Once upon a time", "There was a king who"], REPLICA):
                fetched_as_the_engine_has_them(client, table, blocks)
        else:
            fetched_as_the_engine_has_them(client, table, blocks)
    assert look_up(fleet, ids, host_memory_of(REPLICA))[0].all()
