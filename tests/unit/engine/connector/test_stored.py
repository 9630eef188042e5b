"""The scheduler half with host memory: what vLLM reallocates is stored before that, offered, and imported again."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.connector.step_messages import WorkerReport
from engine.host_process.kept_memory import KeptMemories
from tests.unit.engine.connector.scheduler_fixtures import PLAIN, PROMPT, SIZE, Replica, Request, import_all, keys_of, report
from tests.unit.engine.connector.test_several_groups import WINDOWS
from tests.unit.transport.table_fixtures import description
from transport.table.deliveries import DeliveryReason
from transport.table.kept_table import KeptTable
from transport.table.reader import TableReader

OTHER = list(range(500, 514))


@pytest.fixture
def keeper(tmp_path):
    return KeptMemories(tmp_path)


def stored(keeper, path, name, groups=PLAIN, **about):
    """A replica with sixteen slots of host memory."""
    kept = KeptTable(path, description(f"{name}.host-memory"), groups.unit, 16, Path(keeper.keep(name, 4096).draft))
    return Replica(path, name, groups=groups, tier=kept, **about)


def copy(replica, meta):
    """The worker did what the step brought."""
    replica.half.report(WorkerReport(meta.step, copied={store.slot: 1 for store in meta.stores.begun}))


def evict(replica, ids, tokens=OTHER):
    """vLLM gives these blocks to another prompt; returns what the worker is told."""
    request = Request(f"evicting-{ids}", list(tokens))
    meta = replica.schedule(new=[(request, ids, 0, len(tokens))])
    request.all_token_ids.append(1)
    return meta


def test_without_host_memory_a_step_stores_nothing(tmp_path):
    a = Replica(tmp_path, "a")
    a.prefill(Request("r", list(PROMPT)), [3, 4, 5, 6])
    assert not evict(a, [3, 4, 5, 6]).stores.begun


def test_what_is_reallocated_is_stored_in_that_step_and_restored_by_its_replica_and_by_others(tmp_path, keeper):
    a, b = stored(keeper, tmp_path, "a"), Replica(tmp_path, "b")
    a.prefill(Request("r", list(PROMPT)), [3, 4, 5, 6])
    meta = evict(a, [3, 4, 5, 7])
    assert [(each.block, each.key, each.group) for each in meta.stores.begun] == [
        (block, key.tobytes(), 0) for block, key in zip([3, 4, 5], keys_of(PROMPT), strict=True)
    ]
    assert meta.stores.overwritten == {3, 4, 5}
    assert a.held(PROMPT) == []
    assert b.half.match(Request("too-early", list(PROMPT)), 0) == 0
    copy(a, meta)
    for replica in (a, b):
        tokens, begun = import_all(replica, Request("again", list(PROMPT)), [10, 11, 12, 13])
        assert tokens == 3 * SIZE
        assert begun.imports[0].source == "a.host-memory"


def test_what_has_no_key_or_is_stored_already_is_not_stored(tmp_path, keeper):
    a = stored(keeper, tmp_path, "a")
    assert not evict(a, [3, 4, 5, 6]).stores.begun
    a.prefill(Request("r", list(PROMPT)), [7, 8, 9, 10])
    copy(a, evict(a, [7, 8, 9, 11]))
    a.prefill(Request("again", list(PROMPT)), [12, 13, 14, 15])
    assert not evict(a, [12, 13, 14, 16]).stores.begun


def test_what_the_pool_gives_away_next_is_stored_ahead_and_waited_for_only_when_overwritten(tmp_path, keeper):
    a = stored(keeper, tmp_path, "a")
    a.prefill(Request("r", list(PROMPT)), [3, 4, 5, 6])
    a.half.bind_pool(pool_of(4, 5, 9))
    ahead = evict(a, [20, 21, 22, 23])
    assert [each.block for each in ahead.stores.begun] == [4, 5]
    assert ahead.stores.overwritten == frozenset()
    a.half._pool.free_block_queue = pool_of().free_block_queue
    late = evict(a, [4, 24, 25, 26])
    assert not late.stores.begun
    assert late.stores.overwritten == {4}
    copy(a, ahead)
    assert evict(a, [5, 27, 28, 29]).stores.overwritten == frozenset()


def pool_of(*ids):
    """As much of vLLM's pool as is read: the blocks it would give away next."""
    tail = SimpleNamespace(block_id=-1, next_free_block=None)
    block = tail
    for number in reversed(ids):
        block = SimpleNamespace(block_id=number, next_free_block=block)
    head = SimpleNamespace(block_id=-1, next_free_block=block)
    return SimpleNamespace(cached_block_hash_to_block={}, free_block_queue=SimpleNamespace(fake_free_list_head=head), blocks=[])


def test_what_an_import_overwrites_is_stored_before_it_begins(tmp_path, keeper):
    a, b = stored(keeper, tmp_path, "a"), Replica(tmp_path, "b")
    b.prefill(Request("r", list(OTHER)), [3, 4, 5, 6])
    a.prefill(Request("s", list(PROMPT)), [3, 4, 5, 6])
    _, meta = import_all(a, Request("t", list(OTHER)), [3, 4, 5, 6])
    assert meta.imports[0].target_blocks.tolist() == [3, 4, 5]
    assert [each.block for each in meta.stores.begun] == [3, 4, 5]
    assert meta.stores.overwritten == {3, 4, 5}


def test_a_salt_is_a_cache_of_its_own_there_too(tmp_path, keeper):
    a = stored(keeper, tmp_path, "a")
    a.prefill(Request("r", list(PROMPT), cache_salt="one"), [3, 4, 5, 6])
    copy(a, evict(a, [3, 4, 5, 7]))
    assert a.half.match(Request("other", list(PROMPT), cache_salt="two"), 0) == 0
    assert a.half.match(Request("none", list(PROMPT)), 0) == 0
    assert a.half.match(Request("same", list(PROMPT), cache_salt="one"), 0) == 3 * SIZE


def test_restored_tokens_are_counted_by_themselves(tmp_path, keeper):
    a = stored(keeper, tmp_path, "a")
    a.prefill(Request("r", list(PROMPT)), [3, 4, 5, 6])
    copy(a, evict(a, [3, 4, 5, 7]))
    request = Request("again", list(PROMPT))
    _, meta = import_all(a, request, [10, 11, 12, 13])
    a.done(meta.step, again=report())
    meta = a.schedule(new=[(request, [10, 11, 12, 13], 12, 2)])
    assert a.counted()["tier_tokens_host_memory"] == 12
    assert "peer_tokens_shared_memory" not in a.counted()
    request.all_token_ids.append(1)
    a.done(meta.step)
    delivered = a.reader.deliveries(0)[1][-1]
    assert (delivered.source, delivered.peer_tokens, delivered.why) == ("a.host-memory", 12, DeliveryReason.NONE)


def test_a_reset_empties_host_memory_and_ends_what_is_under_way(tmp_path, keeper):
    a = stored(keeper, tmp_path, "a")
    a.prefill(Request("r", list(PROMPT)), [3, 4, 5, 6])
    copy(a, evict(a, [3, 8, 9, 10]))
    meta = evict(a, [4, 5, 11, 12])
    a.half.reset()
    copy(a, meta)
    with_nothing = TableReader(tmp_path / "a.host-memory.table")
    assert with_nothing.cached_blocks() == 0


def test_what_another_replica_stored_is_not_stored_twice(tmp_path, keeper):
    a, b = stored(keeper, tmp_path, "a"), stored(keeper, tmp_path, "b")
    for replica in (a, b):
        replica.prefill(Request("r", list(PROMPT)), [3, 4, 5, 6])
    copy(a, evict(a, [3, 4, 5, 7]))
    assert not evict(b, [3, 4, 5, 7]).stores.begun


def test_blocks_are_stored_with_the_group_that_they_are_of(tmp_path, keeper):
    a = stored(keeper, tmp_path, "a", groups=WINDOWS)
    a.prefill(Request("r", list(PROMPT)), ([3, 4, 5, 6], [13, 14, 15, 16]))
    meta = evict(a, ([3, 4, 5, 7], [13, 14, 15, 17]))
    assert {each.block: each.group for each in meta.stores.begun} == {3: 1, 4: 1, 5: 1, 13: 0, 14: 0, 15: 0}
