"""The scheduler half with host memory: what vLLM reallocates is stored before that, offered, and imported again."""

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.connector.ahead import AHEAD_BLOCKS_MIN, CALM_BLOCKS, CALM_STEPS
from engine.connector.step_messages import WorkerReport
from tests.unit.engine.connector.scheduler_fixtures import PLAIN, PROMPT, SIZE, Replica, Request, import_all, keys_of, report
from tests.unit.engine.connector.test_pins import Pool
from tests.unit.engine.connector.test_several_groups import WINDOWS
from tests.unit.engine.keeper import Keeper
from tests.unit.transport.table_fixtures import description
from transport.table.deliveries import DeliveryReason
from transport.table.kept_table import KeptTable
from transport.table.quality import CODED, LATER, LOSSY, QUALITY, lossy_salt
from transport.table.reader import TableReader

OTHER = list(range(500, 514))


@pytest.fixture
def keeper(tmp_path):
    return Keeper(tmp_path)


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


def test_what_another_node_is_to_read_is_stored_with_the_next_step_at_once(tmp_path, keeper):
    a, b = stored(keeper, tmp_path, "a"), Replica(tmp_path, "b")
    a.prefill(Request("r", list(PROMPT)), [3, 4, 5, 6])
    wish = Request("wish", [0], kv_transfer_params={"peerkv": {"source": "", "store": [4, 3, 6, 7, 1 << 40]}})
    a.half.arrived(wish)
    meta = a.schedule()
    assert [(each.block, each.key) for each in meta.stores.begun] == [
        (block, keys_of(PROMPT)[place].tobytes()) for block, place in ((4, 1), (3, 0))
    ]
    assert (meta.stores.at_once, meta.stores.overwritten) == (True, frozenset())
    copy(a, meta)
    assert a.held(PROMPT) == [3, 4, 5]
    with closing(TableReader(a.half.table.path.with_name("a.host-memory.table"))) as tier:
        assert tier.look_up(keys_of(PROMPT))[0].tolist() == [True, True, False]
    assert not a.schedule().stores.begun  # once
    assert import_all(b, Request("again", list(PROMPT)), [10, 11, 12, 13])[0] == 3 * SIZE


def test_what_is_reallocated_in_the_step_that_was_to_store_it_is_stored_once(tmp_path, keeper):
    a = stored(keeper, tmp_path, "a")
    a.prefill(Request("r", list(PROMPT)), [3, 4, 5, 6])
    a.half.arrived(Request("wish", [0], kv_transfer_params={"peerkv": {"store": [3, 4]}}))
    meta = evict(a, [3, 7, 8, 9])
    assert sorted(each.block for each in meta.stores.begun) == [3, 4]
    assert meta.stores.overwritten == {3}


def quality_of(replica, table, salt):
    """The bits of each block of PROMPT that a table offers."""
    with closing(TableReader(replica.half.table.path.with_name(f"{table}.table"))) as reader:
        held, _, states = reader.look_up(keys_of(PROMPT, salt))
        return [int(state) & QUALITY for state in states[held]]


def test_blocks_of_a_caller_who_accepts_loss_say_so_wherever_they_go(tmp_path, keeper):
    a, b = stored(keeper, tmp_path, "a"), Replica(tmp_path, "b")
    for salt, bits in (("s", [0, 0, 0]), (lossy_salt("s"), [LOSSY, LOSSY | LATER, LOSSY | LATER])):
        a.prefill(Request(f"r{salt}", list(PROMPT), cache_salt=salt), [3, 4, 5, 6])
        assert quality_of(a, "a", salt) == bits
        copy(a, evict(a, [3, 4, 5, 7]))
        assert quality_of(a, "a.host-memory", salt) == bits
        request = Request(f"again{salt}", list(PROMPT), cache_salt=salt)
        b.imports_and_computes(request, [10, 11, 12, 13])
        assert quality_of(b, "b", salt) == bits


def test_blocks_that_came_out_of_a_codec_are_remembered_until_they_are_given_away(tmp_path, keeper):
    salt = lossy_salt("")
    a, b = Replica(tmp_path, "a"), stored(keeper, tmp_path, "b")
    a.half.table.publish([3, 4], keys_of(PROMPT, salt)[:2], LOSSY | CODED)
    b.imports_and_computes(Request("r", list(PROMPT), cache_salt=salt), [10, 11, 12, 13])
    bits = [LOSSY | CODED, LOSSY | CODED | LATER, LOSSY | LATER]
    assert quality_of(b, "b", salt) == bits
    copy(b, evict(b, [10, 11, 12, 14]))
    assert quality_of(b, "b.host-memory", salt) == bits
    b.prefill(Request("other", list(OTHER), cache_salt=salt), [10, 11, 12, 13])
    states = b.reader.longest_run(keys_of(OTHER, salt)).states
    assert [int(state) & QUALITY for state in states] == [LOSSY, LOSSY | LATER, LOSSY | LATER]


def test_a_sequence_has_one_first_block_of_each_group_of_layers_in_however_many_steps_it_is_computed(tmp_path):
    salt, ids = lossy_salt(""), ([3, 4, 5, 6], [13, 14, 15, 16])
    a = Replica(tmp_path, "a", groups=WINDOWS)
    request = Request("r", list(PROMPT), cache_salt=salt)
    a.half.match(request, 0)
    a.done(a.schedule(new=[(request, ids, 0, SIZE)]).step)
    meta = a.schedule(cached=[(request, None, SIZE, len(PROMPT) - SIZE)])
    request.all_token_ids.append(1)
    a.done(meta.step)
    for group, blocks in enumerate(ids):
        assert a.half.table.offered(blocks)[0] == blocks[:3]
        assert a.half.table.quality(blocks[:3]) == [LOSSY, LOSSY | LATER, LOSSY | LATER], group


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


def test_the_more_a_step_took_the_more_is_stored_ahead(tmp_path, keeper):
    tier = KeptTable(tmp_path, description("a.host-memory"), SIZE, 700, Path(keeper.keep("a", 4096).draft))
    a = Replica(tmp_path, "a", blocks=400, tier=tier)
    ids = list(range(1000, 1000 + 200 * SIZE))
    a.half.bind_pool(pool_of())
    a.prefill(Request("r", ids), list(range(1, 201)))
    a.half._pool.free_block_queue = pool_of(*range(1, 201)).free_block_queue
    few = a.schedule(new=[(Request("few", list(OTHER)), [300, 301, 302, 303], 0, len(OTHER))])
    assert len(few.stores.begun) == AHEAD_BLOCKS_MIN
    many = a.schedule(new=[(Request("many", ids[: 80 * SIZE]), list(range(304, 384)), 0, 80 * SIZE)])
    assert len(many.stores.begun) == 2 * 80 - AHEAD_BLOCKS_MIN


def idle_with(replica, pool):
    """The empty step that vLLM takes when the last request has ended; `pool` is what it would give away next."""
    for name in list(replica.half._sequences):
        replica.half.finished(name)
    replica.half.bind_pool(pool)
    return replica.schedule()


def test_an_engine_that_becomes_idle_stores_what_it_would_give_away_next_once(tmp_path, keeper):
    a = stored(keeper, tmp_path, "a")
    a.prefill(Request("r", list(PROMPT)), [3, 4, 5, 6])
    meta = idle_with(a, pool_of(7, 5, 4, 3))
    assert [each.block for each in meta.stores.begun] == [5, 4, 3]
    assert (meta.stores.at_once, meta.stores.overwritten) == (True, frozenset())
    assert not a.schedule().stores.begun
    copy(a, meta)
    late = evict(a, [3, 4, 5, 7])
    assert not late.stores.begun
    assert late.stores.overwritten == frozenset()
    with closing(TableReader(tmp_path / "a.host-memory.table")) as tier:
        counters = tier.counters()
        assert (counters["tier_ahead_blocks"], counters["published_blocks"]) == (3, 3)


def test_what_is_reallocated_while_an_idle_engine_stores_it_is_waited_for_and_not_stored_twice(tmp_path, keeper):
    a = stored(keeper, tmp_path, "a")
    a.prefill(Request("r", list(PROMPT)), [3, 4, 5, 6])
    meta = idle_with(a, pool_of(5, 4, 3))
    late = evict(a, [4, 9, 10, 11])
    assert (late.stores.begun, late.stores.overwritten) == ((), {4})
    copy(a, meta)
    assert a.half.match(Request("again", list(PROMPT)), 0) == 3 * SIZE


def test_nothing_is_stored_far_ahead_beside_imports(tmp_path, keeper):
    a, b = stored(keeper, tmp_path, "a"), Replica(tmp_path, "b")
    b.prefill(Request("r", list(OTHER)), [3, 4, 5, 6])
    a.prefill(Request("s", list(PROMPT)), [3, 4, 5, 6])
    a.half.finished("s")
    a.half.bind_pool(pool_of())
    _, meta = import_all(a, Request("t", list(OTHER)), [10, 11, 12, 13])
    a.half.bind_pool(pool_of(3, 4, 5))
    for _ in range(2 * CALM_STEPS):  # as vLLM does while it waits
        assert not a.schedule().stores.begun
    a.done(meta.step, t=report())
    assert [each.block for each in idle_with(a, pool_of(3, 4, 5)).stores.begun] == [3, 4, 5]


def test_nothing_is_stored_far_ahead_beside_prompts(tmp_path, keeper):
    a = stored(keeper, tmp_path, "a", blocks=200)
    a.prefill(Request("s", list(PROMPT)), [3, 4, 5, 6])
    a.half.finished("s")
    long = Request("long", list(range(1000, 1400)))
    a.half.match(long, 0)
    a.half.bind_pool(pool_of())
    a.schedule(new=[(long, list(range(10, 110)), 0, 8)])
    a.half.bind_pool(pool_of(3, 4, 5))
    for step in range(1, 2 * CALM_STEPS):
        assert not a.schedule(cached=[(long, None, 8 * step, 8)]).stores.begun
    assert [each.block for each in idle_with(a, pool_of(3, 4, 5)).stores.begun] == [3, 4, 5]


def test_steps_that_only_decode_store_a_few_at_a_time(tmp_path, keeper):
    tier = KeptTable(tmp_path, description("a.host-memory"), SIZE, 4000, Path(keeper.keep("a", 4096).draft))
    a = Replica(tmp_path, "a", blocks=800, tier=tier)
    request = Request("r", list(range(1000, 1000 + 300 * SIZE)))
    a.half.bind_pool(pool_of())
    a.prefill(request, list(range(1, 301)))
    a.half.bind_pool(pool_of(*range(1, 301)))
    begun = []
    for step in range(4 * CALM_STEPS):
        meta = a.schedule(cached=[(request, None, 300 * SIZE + step, 1)])
        begun.append(len(meta.stores.begun))
        assert not meta.stores.at_once
        a.done(meta.step)
    assert [count for count in begun if count] == [CALM_BLOCKS, CALM_BLOCKS, 300 - 2 * CALM_BLOCKS]
    assert [step % CALM_STEPS for step, count in enumerate(begun) if count] == [CALM_STEPS - 1] * 3


def test_what_an_import_overwrites_is_stored_before_it_begins(tmp_path, keeper):
    a, b = stored(keeper, tmp_path, "a"), Replica(tmp_path, "b")
    b.prefill(Request("r", list(OTHER)), [3, 4, 5, 6])
    a.prefill(Request("s", list(PROMPT)), [3, 4, 5, 6])
    _, meta = import_all(a, Request("t", list(OTHER)), [3, 4, 5, 6])
    assert meta.imports[0].target_blocks.tolist() == [3, 4, 5]
    assert [each.block for each in meta.stores.begun] == [3, 4, 5]
    assert meta.stores.imported == {3, 4, 5}
    assert meta.stores.overwritten == frozenset()  # the step itself waits for nothing


def test_what_an_import_that_failed_left_to_be_computed_is_still_stored_before_that(tmp_path, keeper):
    a, b = stored(keeper, tmp_path, "a"), Replica(tmp_path, "b")
    b.prefill(Request("r", list(OTHER)), [3, 4, 5, 6])
    a.prefill(Request("s", list(PROMPT)), [3, 4, 5, 6])
    request = Request("t", list(OTHER))
    _, meta = import_all(a, request, [3, 4, 5, 6])
    a.done(meta.step, t=report(failed=[4, 5]))
    again = a.schedule(new=[(request, [3, 4, 5, 6], SIZE, len(OTHER) - SIZE)])
    assert again.stores.overwritten == {4, 5}


def test_what_vllm_overwrites_before_it_tells_a_worker_of_the_step_is_lost_there(tmp_path, keeper):
    a = stored(keeper, tmp_path, "a")
    a.prefill(Request("r", list(PROMPT)), [3, 4, 5, 6])
    meta = a.schedule(new=[(Request("evicting", list(OTHER)), [3, 4, 5, 7], 0, len(OTHER))], zeroed=[3, 7], copies=[4])
    assert meta.stores.lost == {3, 4}
    assert meta.stores.overwritten == {3, 4, 5}


def test_what_a_worker_lost_is_not_offered(tmp_path, keeper):
    a = stored(keeper, tmp_path, "a")
    a.prefill(Request("r", list(PROMPT)), [3, 4, 5, 6])
    meta = evict(a, [3, 4, 5, 7])
    slots = {store.block: store.slot for store in meta.stores.begun}
    a.half.report(WorkerReport(meta.step, copied=dict.fromkeys(slots.values(), 1), lost=frozenset({slots[4]})))
    assert a.half.match(Request("again", list(PROMPT)), 0) == SIZE


@pytest.mark.parametrize(("groups", "ids"), [(PLAIN, [3, 4, 5, 6]), (WINDOWS, ([3, 4, 5, 6], [13, 14, 15, 16]))])
def test_a_prompt_that_was_found_here_again_outlives_one_that_was_not(tmp_path, keeper, groups, ids):
    a = stored(keeper, tmp_path, "a", groups=groups, blocks=200)
    a.prefill(Request("r", list(PROMPT)), ids)
    for turn in range(3):
        a.prefill(Request(f"again-{turn}", list(PROMPT)), ids, computed=3 * SIZE)
    copy(a, evict(a, ids))
    block, count = 20, 4 if groups is PLAIN else 8
    for begin in range(1000, 1000 + 24 // count * 20, 20):  # more blocks than there are slots
        own = list(range(block, block + count))
        mine = own if groups is PLAIN else (own[:4], own[4:])
        a.prefill(Request(f"once-{begin}", list(range(begin, begin + 14))), mine)
        copy(a, evict(a, mine, list(range(begin + 5000, begin + 5014))))
        block += count
    assert a.half.match(Request("at last", list(PROMPT)), 0) == 3 * SIZE


def test_what_an_import_reads_does_not_give_way_before_it_ended(tmp_path, keeper):
    a = stored(keeper, tmp_path, "a", blocks=200)
    a.prefill(Request("r", list(PROMPT)), [3, 4, 5, 6])
    copy(a, evict(a, [3, 4, 5, 7]))
    _, meta = import_all(a, Request("again", list(PROMPT)), [10, 11, 12, 13])
    churn(a, 20)
    assert a.half.match(Request("other", list(PROMPT)), 0) == 3 * SIZE
    a.done(meta.step, again=report())
    churn(a, 110)
    assert a.half.match(Request("late", list(PROMPT)), 0) == 0


def churn(replica, first):
    """Have twenty blocks computed and reallocated, each prompt asked for several times, behind the blocks from `first`."""
    for number in range(7):
        begin, ids = 100 * (first + number), list(range(first + 4 * number, first + 4 * number + 4))
        for turn in range(5):
            replica.prefill(Request(f"{begin}-{turn}", list(range(begin, begin + 14))), ids, computed=3 * SIZE if turn else 0)
        copy(replica, evict(replica, ids, list(range(begin + 50, begin + 64))))


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


def test_what_a_replica_of_another_kind_stored_is_not_read(tmp_path, keeper):
    a, b = stored(keeper, tmp_path, "a"), Replica(tmp_path, "b")
    draft = Path(keeper.keep("c", 4096).draft)
    other = KeptTable(tmp_path, description("c.host-memory", transport="cuda_ipc"), PLAIN.unit, 16, draft)
    other.publish([0, 1, 2], keys_of(PROMPT)[:3])
    assert b.half.match(Request("r", list(PROMPT)), 0) == 0
    a.prefill(Request("r", list(PROMPT)), [3, 4, 5, 6])
    assert len(evict(a, [3, 4, 5, 7]).stores.begun) == 3  # nor does it spare storing them here


def test_blocks_are_stored_with_the_group_that_they_are_of(tmp_path, keeper):
    a = stored(keeper, tmp_path, "a", groups=WINDOWS)
    a.prefill(Request("r", list(PROMPT)), ([3, 4, 5, 6], [13, 14, 15, 16]))
    meta = evict(a, ([3, 4, 5, 7], [13, 14, 15, 17]))
    assert {each.block: each.group for each in meta.stores.begun} == {3: 1, 4: 1, 5: 1, 13: 0, 14: 0, 15: 0}


def test_a_prefix_that_is_pinned_is_stored_at_once_and_stays_there_until_it_is_unpinned(tmp_path, keeper):
    a = stored(keeper, tmp_path, "a", pin_share_max=0.5)
    a.half.bind_pool(FreePool())
    wish = {"peerkv": {"pin": {"id": 1, "seconds": 10.0}}}
    a.prefill(Request("r", list(PROMPT), kv_transfer_params=wish), [3, 4, 5, 6])
    meta = a.schedule()
    assert [(each.block, each.key) for each in meta.stores.begun] == [
        (block, key.tobytes()) for block, key in zip([3, 4, 5], keys_of(PROMPT), strict=True)
    ]
    copy(a, meta)
    flood(a)
    with closing(TableReader(a.half.table.path.with_name("a.host-memory.table"))) as reader:
        assert len(reader.longest_run(keys_of(PROMPT)).block_ids) == 3
        a.half.arrived(Request("end", [1], kv_transfer_params={"peerkv": {"unpin": [1]}}))
        flood(a)
        assert len(reader.longest_run(keys_of(PROMPT)).block_ids) == 0


def test_an_import_from_before_a_flush_does_not_end_a_pin_from_after_it_when_it_ends(tmp_path, keeper):
    a = stored(keeper, tmp_path, "a", pin_share_max=0.5)
    a.half.bind_pool(FreePool())
    a.prefill(Request("r", list(PROMPT)), [3, 4, 5, 6])
    copy(a, evict(a, [3, 4, 5, 7]))
    _, reading = import_all(a, Request("again", list(PROMPT)), [10, 11, 12, 13])
    a.half.reset()
    wish = {"peerkv": {"pin": {"id": 1, "seconds": 10.0}}}
    a.prefill(Request("pinned", list(PROMPT), kv_transfer_params=wish), [14, 15, 16, 17])
    meta = a.schedule()
    copy(a, meta)
    assert {store.slot for store in meta.stores.begun} == set(reading.imports[0].source_blocks.tolist())
    a.done(reading.step, again=report())
    flood(a)
    with closing(TableReader(a.half.table.path.with_name("a.host-memory.table"))) as reader:
        assert len(reader.longest_run(keys_of(PROMPT)).block_ids) == 3


class FreePool(Pool):
    """A pool that has no free blocks to tell of."""

    free_block_queue = pool_of().free_block_queue


def flood(replica):
    """Have more prompts leave vLLM's cache than host memory has room for."""
    for number in range(12):
        prompt = Request(f"flood-{number}-{replica.half._step}", list(range(1000 + 20 * number, 1014 + 20 * number)))
        replica.prefill(prompt, [10, 11, 12, 13])
        copy(replica, evict(replica, [10, 11, 12, 13], range(5000 + 20 * number, 5014 + 20 * number)))
