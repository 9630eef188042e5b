"""Beside another connector under vLLM's MultiConnector, in vLLM's own scheduler: what is on offer is what its key says."""

import random
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorRole
from vllm.v1.request import RequestStatus

from engine.connector.peerkv_connector import PeerKVConnector
from engine.connector.step_messages import Handshake
from engine.host_process.kept_memory import VARIABLE, encode_kept
from engine.tiers.slots import cut
from tests.unit.engine.connector.sibling import BesideSibling, Load
from tests.unit.engine.connector.test_imports_at_random import PROMPTS, STEPS, Computing
from tests.unit.engine.connector.test_in_vllms_scheduler import BLOCKS, HANDSHAKE, SIZE
from tests.unit.engine.keeper import Keeper
from transport.keys import chain_keys, root_key
from transport.table.layout import Layer, Memory
from transport.table.reader import TableReader

RUNNERS = {"v1": ("v1", 0), "v1-ahead": ("v1", 1), "v2-ahead": ("v2", 1)}
WAITS = pytest.mark.parametrize("waits", [0, 3], ids=["with-the-step", "before-the-step"])


@pytest.fixture(params=["ours-first", "sibling-first"])
def order(request, monkeypatch) -> None:
    monkeypatch.setattr(BesideSibling, "ours_first", request.param == "ours-first")


@pytest.fixture(params=RUNNERS.values(), ids=RUNNERS)
def engine(request, tmp_path, order) -> Iterator[BesideSibling]:
    made = BesideSibling(tmp_path, *request.param, rng=random.Random(3))
    yield made
    made.table.close()
    made.scheduler.connector.shutdown()


@pytest.fixture
def importing(engine, tmp_path) -> Iterator[BesideSibling]:
    """With a peer that has PROMPTS."""
    owner = engine.owners["owner"] = Computing(tmp_path, "v1", 0, name="owner")
    for number, prompt in enumerate(PROMPTS):
        owner.add_ids(f"o{number}", prompt, 1, source="")
    owner.run()
    yield engine
    owner.table.close()
    owner.scheduler.connector.shutdown()


def fill(engine, name: str = "before", first: int = 10) -> set[int]:
    """Use all blocks once, so that whoever comes next is given some that are on offer; return those."""
    for number in range(2):
        engine.add(f"{name}{number}", first + 490 * number, 11 * SIZE, 2, source="")
        engine.run()
    return set(engine.on_offer())


def held(engine, name: str, tokens: int) -> int:
    """How many leading blocks of a request are on offer."""
    return len(engine.table.longest_run(chain_keys(root_key(engine.table.fingerprint), engine.tokens[name][:tokens], SIZE)))


@pytest.mark.parametrize(("policy", "said"), [("recompute", "ok"), ("fail", 'add "kv_load_failure_policy": "recompute"')])
def test_unless_vllm_computes_what_failed_to_load_nothing_is_exchanged(tmp_path, monkeypatch, order, policy, said):
    monkeypatch.setattr(BesideSibling, "failure_policy", policy)
    monkeypatch.setattr(PeerKVConnector, "_read", lambda *_: {"device": "cpu"})
    engine = BesideSibling(tmp_path, "v1", 0)
    scheduler = engine.scheduler
    worker = KVConnectorFactory.create_connector(scheduler.vllm_config, KVConnectorRole.WORKER, scheduler.kv_cache_config)
    monkeypatch.setattr("vllm.distributed.kv_transfer.kv_transfer_state._KV_CONNECTOR_AGENT", worker)
    worker.register_kv_caches({"layer": torch.zeros(BLOCKS, 2, SIZE, 8)})
    engine.handshake = worker.get_handshake_metadata()
    engine.tell_of_memory()
    with closing(TableReader(engine.tables / "replica-0.table")) as table:
        assert said in table.status
        engine.add("a", 10, 5 * SIZE, 2, source="")
        engine.run()
        assert table.cached_blocks() == (5 if policy == "recompute" else 0)
    assert scheduler.recompute_kv_load_failures is (policy == "recompute")
    worker.shutdown()
    scheduler.connector.shutdown()


def test_with_the_handshake_of_another_connector_nothing_is_exchanged_and_the_table_says_why(tmp_path):
    engine = BesideSibling(tmp_path, "v1", 0)
    engine.handshake = KVConnectorHandshakeMetadata()
    engine.tell_of_memory()
    with closing(TableReader(engine.tables / "replica-0.table")) as table:
        assert "name PeerKVConnector before it" in table.status
        request = engine.add("a", 10, 5 * SIZE, 2)
        engine.run()
        assert (table.cached_blocks(), request.num_output_tokens) == (0, 2)
    engine.scheduler.connector.shutdown()


@WAITS
def test_blocks_that_another_connector_loads_into_are_not_on_offer_before_it_has(engine, waits):
    before = fill(engine)
    load = engine.sibling.has["s"] = Load(4 * SIZE, waits)
    engine.add("s", 700, 100, 2, source="")
    engine.step()
    assert len(before.intersection(load.blocks)) >= 2
    if engine.ahead or waits:  # otherwise the step is over, and so is the load
        assert not engine.on_offer().keys() & set(load.blocks)
    engine.run()
    assert held(engine, "s", 100) == 6
    assert engine.table.counters()["table_errors"] == 0


@WAITS
def test_what_this_engine_has_itself_stays_on_offer_while_another_connector_loads_what_follows(engine, waits):
    engine.add("a", 700, 3 * SIZE + 1, 2, source="")
    engine.run()
    load = engine.sibling.has["s"] = Load(5 * SIZE, waits)
    engine.add("s", 700, 100, 2, source="")
    engine.step()
    assert len(load.blocks) == 2
    assert held(engine, "s", 100) == (6 if not (engine.ahead or waits) else 3)
    evicted = engine.table.counters()["evictions"]
    engine.run()
    assert held(engine, "s", 100) == 6
    assert engine.table.counters()["evictions"] == evicted == 0


@pytest.mark.parametrize(("waits", "good"), [(0, 0), (0, 2), (3, 2)])
def test_what_another_connector_failed_to_load_is_computed_and_never_on_offer_as_it_was(engine, waits, good):
    fill(engine)
    load = engine.sibling.has["s"] = Load(4 * SIZE, waits, good)
    request = engine.add("s", 700, 100, 20, source="")
    engine.run()  # which looks at every offer
    assert (len(load.failed), request.num_output_tokens) == (4 - good, 20)
    assert held(engine, "s", 100) == (good if not waits else 6)  # what a step has used may be shared by now
    for number, first in enumerate((110, 600)):  # they are given all blocks, one after the other
        engine.add(f"again{number}", first, 11 * SIZE + 1, 2, source="")
        engine.run()
        assert held(engine, f"again{number}", 11 * SIZE) == 11


def test_who_shares_a_block_whose_load_failed_offers_nothing_behind_it(engine):
    engine.sibling.has["s"] = Load(4 * SIZE, 0, 2)
    engine.add("s", 700, 5 * SIZE, 6, source="")
    engine.add("shares", 700, 4 * SIZE + 2, 20, source="")  # in the same step
    if engine.ahead:
        engine.step()
        engine.add("later", 700, 4 * SIZE + 4, 20, source="")  # while that step is under way
    engine.run()
    assert [held(engine, name, 8 * SIZE) for name in ("s", "shares")] == [2, 2]
    engine.add("after", 700, 6 * SIZE, 20, source="")
    engine.run()
    assert held(engine, "after", 6 * SIZE) == 2


def test_an_import_of_ours_that_fails_is_computed_and_offered(importing):
    importing.rng.random, importing.rng.choice = (lambda: 0.0), (lambda _: 1)  # one block arrives, the rest fails
    request = importing.add_ids("r", PROMPTS[0], 5, tag=1, source="owner")
    importing.run()
    counted = importing.table.counters()
    assert (counted["imports"], counted["fallbacks"], counted["table_errors"]) == (1, 1, 0)
    assert request.num_output_tokens == 5
    assert importing.records[1].peer_tokens == SIZE
    assert held(importing, "r", len(PROMPTS[0])) == 9


@WAITS
def test_of_two_connectors_that_have_a_prefix_the_first_one_loads_it_and_the_other_nothing(importing, waits):
    importing.rng.random, importing.rng.choice = (lambda: 1.0), (lambda _: 9)
    load = importing.sibling.has["r"] = Load(4 * SIZE, waits)
    importing.add_ids("r", PROMPTS[0], 5, tag=1, source="owner")
    importing.run()
    record, imports = importing.records[1], importing.table.counters()["imports"]
    taken = (imports, record.peer_tokens // SIZE, record.local_tokens // SIZE, len(load.blocks))
    assert taken == ((1, 9, 0, 0) if importing.ours_first else (0, 0, 4, 4))
    assert held(importing, "r", len(PROMPTS[0])) == 9
    assert importing.table.load().waiting_requests == 0


def test_pins_outlast_a_long_load_of_another_connector(engine):
    engine.add("a", 10, 64, 2, tag=1, source="", pin={"id": 1, "seconds": 3600})
    engine.run()
    engine.sibling.has["s"] = Load(4 * SIZE, 20)
    engine.add("s", 700, 100, 2, source="")
    engine.run()
    assert engine.table.load().pinned_blocks == 4


def test_what_another_connector_overwrites_is_stored_before_or_not_at_all(tmp_path, monkeypatch, order):
    """On the CPU it is copied before the load begins. On a GPU nothing has loads of others wait for that: it is lost."""
    (tmp_path / "tables").mkdir(mode=0o700)
    keeper = Keeper(tmp_path / "tables")
    kept = keeper.keep("replica-0", 1 << 16)
    monkeypatch.setenv(VARIABLE, encode_kept(kept))
    slots = cut(kept.region, Memory(0, "shared_memory", (), (Layer(0, 0, 960, 960),)), 1)
    engine = BesideSibling(tmp_path, "v1", 1, handshake=Handshake(HANDSHAKE.memory, "ok", {}, slots))
    monkeypatch.setattr("engine.connector.ahead._next_free", lambda *_: [])  # nothing is stored ahead
    for waits in (0, 3):
        fill(engine, f"before{waits}-", 10 + waits)
        before = engine.on_offer()
        load = engine.sibling.has[f"s{waits}"] = Load(6 * SIZE, waits)
        engine.add(f"s{waits}", 700 + waits, 100, 2, source="")
        engine.step()
        stores = engine._of(engine.under_way[-1].kv_connector_metadata, ours=True).stores
        taken = set(load.blocks) & before.keys()
        assert len(taken) > 2
        assert taken <= {store.block for store in stores.begun if store.key == before[store.block]}
        assert taken <= stores.overwritten & stores.lost
        engine.run()
    with closing(TableReader(engine.tables / "replica-0.host-memory.table")) as tier:
        keys = chain_keys(root_key(tier.fingerprint), engine.tokens["before0-0"][: 11 * SIZE], SIZE)
        assert tier.look_up(keys)[0].any()
    engine.table.close()
    engine.scheduler.connector.shutdown()


def test_at_random_whatever_is_on_offer_is_what_its_key_says(importing):
    """Hits, imports, the other connector's loads, failures, preemptions, aborts and resets."""
    rng, asked, loads = importing.rng, 0, []
    for _ in range(STEPS):
        chance, requests = rng.random(), importing.scheduler.requests
        if chance < 0.25 and len(requests) < 6:
            prompt = rng.choice(PROMPTS)
            ids = prompt[: rng.randint(1, len(prompt))] + [900 + rng.randrange(3)] * rng.randint(0, 20)
            asked += 1
            if len(ids) > SIZE and rng.random() < 0.6:
                most = (len(ids) - 1) // SIZE
                good = rng.choice((None, None, 0, 1))
                loads.append(Load(rng.randint(1, most) * SIZE, rng.choice((0, 1, 4)), good))
                importing.sibling.has[f"r{asked}"] = loads[-1]
            importing.add_ids(f"r{asked}", ids, rng.randint(1, 20), tag=asked, source=rng.choice(("owner", "")))
        elif chance < 0.29 and requests:
            importing.scheduler.finish_requests(rng.choice(list(requests)), RequestStatus.FINISHED_ABORTED)
        elif chance < 0.31:
            with suppress(RuntimeError):  # vLLM refuses to reset while a load is under way, with all preempted
                importing.scheduler.reset_prefix_cache(reset_running_requests=rng.random() < 0.7)
        if importing.scheduler.has_requests():
            importing.step()
        elif importing.under_way:
            importing._report(importing.under_way.pop(0))
    importing.run(2000)
    done = [load for load in loads if load.blocks]
    assert {(load.waits > 0, bool(load.failed)) for load in done} == {(a, b) for a in (False, True) for b in (False, True)}
    assert importing.table.counters()["imports"] > 5
    assert importing.pool.get_num_free_blocks() == BLOCKS - 1
    assert importing.table.counters()["table_errors"] == 0
