"""The scheduler half: what is offered, what is withdrawn, what is imported, over the calls that vLLM makes."""

from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest

from engine.connector.import_sources import UNREADABLE_MAX
from engine.connector.step_messages import ImportReport, WorkerReport
from tests.unit.engine.connector.scheduler_fixtures import PROMPT, SIZE, Replica, Request, import_all, keys_of, report, run_on
from tests.unit.transport.table_fixtures import FIELDS, writer
from transport.table.reader import TableReader


@pytest.fixture
def pair(tmp_path):
    a, b = Replica(tmp_path, "replica-0"), Replica(tmp_path, "replica-1")
    with closing(a.half), closing(b.half):
        yield a, b


def test_a_prompts_blocks_are_offered_when_its_step_is_reported_not_before(pair):
    a, _ = pair
    request = Request("r", list(PROMPT))
    a.half.match(request, 0)
    meta = a.schedule(new=[(request, [5, 6, 7, 8], 0, 14)])
    assert a.held(PROMPT) == []
    request.all_token_ids.append(1)
    a.done(meta.step)
    assert a.held(PROMPT) == [5, 6, 7]


def test_a_chunked_prompt_is_offered_chunk_by_chunk(pair):
    a, _ = pair
    request = Request("r", list(PROMPT))
    a.half.match(request, 0)
    first = a.schedule(new=[(request, [5, 6], 0, 6)])
    a.done(first.step)
    assert a.held(PROMPT) == [5]
    second = a.schedule(cached=[(request, [7, 8], 6, 8)])
    a.done(second.step)
    assert a.held(PROMPT) == [5, 6, 7]


def test_decoded_blocks_are_offered_as_they_fill_and_the_last_ones_after_the_request_finished(pair):
    a, _ = pair
    request = Request("r", list(PROMPT))
    a.prefill(request, [5, 6, 7, 8])
    for computed in (14, 15):
        meta = a.schedule(cached=[(request, None, computed, 1)])
        request.all_token_ids.append(computed)
        if computed == 15:
            a.half.finished("r")
        a.done(meta.step)
    assert len(request.all_token_ids) == 17
    assert a.held(request.all_token_ids) == [5, 6, 7, 8]


def test_rejected_drafts_are_not_offered(pair):
    a, _ = pair
    request = Request("r", list(PROMPT))
    a.prefill(request, [5, 6, 7, 8])
    meta = a.schedule(cached=[(request, None, 14, 4)])  # one token and three drafts, of which none is accepted
    request.all_token_ids.append(2)
    a.done(meta.step)
    assert a.held(request.all_token_ids) == [5, 6, 7]


def test_a_block_given_to_another_request_is_withdrawn_in_that_very_step(pair):
    a, _ = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    a.half.finished("r")
    other = Request("s", list(range(50, 60)))
    a.half.match(other, 0)
    a.schedule(new=[(other, [6, 9, 10], 0, 10)])
    assert a.held(PROMPT) == [5]
    assert a.counted()["evictions"] == 1


def test_a_local_hit_keeps_its_blocks_on_offer(pair):
    a, _ = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    again = Request("s", list(PROMPT))
    a.half.match(again, 12)
    a.schedule(new=[(again, [5, 6, 7, 9], 12, 2)])
    assert a.held(PROMPT) == [5, 6, 7]
    assert a.counted()["local_tokens"] == 12


def test_a_block_reallocated_before_its_step_was_reported_is_never_offered(pair):
    a, _ = pair
    request = Request("r", list(PROMPT))
    a.half.match(request, 0)
    first = a.schedule(new=[(request, [5, 6, 7, 8], 0, 14)])
    thief = Request("s", list(range(50, 60)))
    a.half.match(thief, 0)
    a.schedule(new=[(thief, [5, 11, 12], 0, 10)])  # the request was preempted while its step was under way
    request.all_token_ids.append(1)
    a.done(first.step)
    assert a.held(PROMPT) == []
    assert a.reader.cached_blocks() == 2


def test_a_resumed_request_offers_its_new_blocks(pair):
    a, _ = pair
    request = Request("r", list(PROMPT))
    a.prefill(request, [5, 6, 7, 8])
    meta = a.schedule(cached=[(request, [15, 16, 17, 18], 0, 15)], resumed=["r"])
    assert a.held(PROMPT) == [5, 6, 7]
    a.done(meta.step)
    assert a.reader.cached_blocks() == 6


def test_a_prefix_that_a_peer_holds_is_imported_and_offered_onward(pair):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    request = Request("s", list(PROMPT))
    tokens, meta = import_all(b, request, [20, 21, 22, 23])
    (job,) = meta.imports
    assert tokens == 12
    assert (job.source, job.source_blocks.tolist(), job.target_blocks.tolist()) == ("replica-0", [5, 6, 7], [20, 21, 22])
    b.done(meta.step, s=report())
    assert b.held(PROMPT) == []
    run_on(b, request, [20, 21, 22, 23], 12)
    assert b.held(PROMPT) == [20, 21, 22]
    counted = b.counted()
    assert (counted["prompt_tokens"], counted["peer_tokens_shared_memory"], counted["computed_tokens"]) == (14, 12, 2)
    assert (counted["imports"], counted["import_blocks"], counted["import_bytes"]) == (1, 3, 1000)
    assert "fallbacks" not in counted


def early(pair, local=0, ranks=1):
    """A replica that imports PROMPT's three blocks, the list of what vLLM was told to enter, and the request."""
    a, b = pair
    entered: list[tuple[str, int]] = []
    b.half.bind_cache(lambda request, tokens: entered.append((request.request_id, tokens)))
    a.prefill(Request("a", list(PROMPT)), [1, 2, 3, 4])
    request = Request("b", list(PROMPT))
    import_all(b, request, [7, 8, 9], local)
    return b, entered, request


def checked(b, blocks, workers=1, **imports):
    b.half.report(WorkerReport(1, imports, dict.fromkeys(imports, 1), checked={"b": blocks}, workers=workers))


def test_blocks_that_are_good_are_entered_in_vllms_cache_once_while_the_rest_is_on_its_way(pair):
    b, entered, _ = early(pair)
    for blocks in (1, 1, 2):
        checked(b, blocks)
    assert entered == [("b", 4), ("b", 8)]
    b.done(2, b=report())
    checked(b, 3)  # its import has ended: vLLM enters the rest
    assert entered == [("b", 4), ("b", 8)]


def test_blocks_behind_a_local_hit_are_entered_behind_it(pair):
    b, entered, _ = early(pair, local=4)
    checked(b, 1)
    assert entered == [("b", 8)]


def test_blocks_that_not_all_workers_call_good_are_not_entered(tmp_path):
    pair = Replica(tmp_path, "replica-0"), Replica(tmp_path, "replica-1", ranks=2)
    b, entered, _ = early(pair)
    checked(b, 1, workers=1)
    assert entered == []
    checked(b, 1, workers=2)
    assert entered == [("b", 4)]
    for each in pair:
        each.half.close()


def test_nothing_is_entered_for_a_request_that_ended_or_after_a_reset(pair):
    b, entered, request = early(pair)
    request.status = "FINISHED_ABORTED"
    checked(b, 1)
    request.status = "WAITING_FOR_REMOTE_KVS"
    pool = SimpleNamespace(cached_block_hash_to_block={}, blocks=[])
    b.half.bind_pool(pool)
    pool.cached_block_hash_to_block = {}
    checked(b, 2)
    assert entered == []


def test_a_partial_local_hit_is_completed_by_a_partial_import(pair):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    request = Request("s", list(PROMPT))
    tokens, meta = import_all(b, request, [2, 21, 22, 23], local=4)
    assert tokens == 8
    assert meta.imports[0].source_blocks.tolist() == [6, 7]
    assert meta.imports[0].target_blocks.tolist() == [21, 22]
    b.done(meta.step, s=report())
    b.schedule(new=[(request, [2, 21, 22, 23], 12, 2)])
    assert b.counted()["local_tokens"] == 4
    assert b.counted()["peer_tokens_shared_memory"] == 8


def test_the_last_token_of_a_prompt_is_always_computed(pair):
    a, b = pair
    a.prefill(Request("r", [*PROMPT[:12], 7]), [5, 6, 7, 8])
    assert b.half.match(Request("s", PROMPT[:12]), 0) == 8


def test_an_import_that_fails_is_not_tried_again_and_counts_as_computed(pair):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    request = Request("s", list(PROMPT))
    _, meta = import_all(b, request, [20, 21, 22, 23])
    b.done(meta.step, s=report(failed=[20, 21, 22], stale=3))
    assert b.held(PROMPT) == []
    assert b.half.match(request, 0) == 0
    b.schedule(new=[(request, [20, 21, 22, 23], 0, 14)])
    counted = b.counted()
    assert (counted["computed_tokens"], counted["fallbacks"], counted["check_failures"]) == (14, 1, 3)
    assert "peer_tokens_shared_memory" not in counted


def test_blocks_before_the_first_failed_one_still_count(pair):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    request = Request("s", list(PROMPT))
    _, meta = import_all(b, request, [20, 21, 22, 23])
    b.done(meta.step, s=report(failed=[21], stale=1))
    run_on(b, request, [20, 21, 22, 23], 4)
    assert b.held(PROMPT) == [20, 21, 22]
    assert b.counted()["peer_tokens_shared_memory"] == 4
    assert b.counted()["import_blocks"] == 1
    assert b.counted()["computed_tokens"] == 10


def test_with_several_ranks_an_import_is_done_when_all_are_and_fails_where_one_did(pair, tmp_path):
    a, b = pair[0], Replica(tmp_path, "replica-2", ranks=2)
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    _, meta = import_all(b, Request("s", list(PROMPT)), [20, 21, 22, 23])
    b.done(meta.step, s=report(failed=[22], stale=1))
    assert "imports" not in b.counted()
    b.done(meta.step + 1, s=report())
    assert (b.counted()["imports"], b.counted()["import_blocks"], b.counted()["fallbacks"]) == (1, 2, 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"cache_salt": "other"},
        {"lora_request": SimpleNamespace(lora_name="adapter", lora_path="/adapter")},
        {"mm_features": [SimpleNamespace(mm_position=SimpleNamespace(offset=1, length=2), identifier="image")]},
        {"skip_reading_prefix_cache": True},
        {"pooling_params": object()},
        {"prompt_embeds": object()},
        {"kv_transfer_params": {"peerkv": {"source": ""}}},
        {"kv_transfer_params": {"peerkv": {"source": "replica-7"}}},
    ],
)
def test_nothing_is_imported_for_a_request_that_differs_or_asks_not_to(pair, changed):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    assert b.half.match(Request("plain", list(PROMPT)), 0) == 12
    assert b.half.match(Request("s", list(PROMPT), **changed), 0) == 0


@pytest.mark.parametrize("hint", [None, {}, {"peerkv": {"source": "replica-0"}}, {"peerkv": 7}, {"other": 1}])
def test_a_hint_names_the_source_and_a_foreign_one_is_ignored(pair, hint):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    assert b.half.match(Request("s", list(PROMPT), kv_transfer_params=hint), 0) == 12


@pytest.mark.parametrize("name", [*FIELDS, "a new field"])
def test_one_differing_field_stops_the_exchange_and_is_named(tmp_path, name, caplog):
    with closing(Replica(tmp_path, "replica-1").half) as half:
        other = FIELDS | {name: "different"}
        with closing(writer(tmp_path, "replica-9", fields=other)) as foreign:
            foreign.publish([1, 2, 3], keys_of(PROMPT))
            assert half.match(Request("s", list(PROMPT)), 0) == 0
            assert half.match(Request("t", list(PROMPT)), 0) == 0
        assert f"{name}: " in caplog.text
        assert caplog.text.count("no exchange with replica-9") == 1
        assert TableReader(half.table.path).counters()["peers_incompatible"] == 1


@pytest.mark.parametrize(
    "about", [{"status": "no"}, {"transport": "cuda_ipc"}, {"hash_name": "sha256"}, {"block_size": SIZE * 2}]
)
def test_a_peer_that_can_not_exchange_is_not_asked(tmp_path, about):
    with closing(Replica(tmp_path, "replica-1").half) as half, closing(writer(tmp_path, "replica-9", **about)) as foreign:
        foreign.publish([1, 2, 3], keys_of(PROMPT))
        assert half.match(Request("s", list(PROMPT)), 0) == 0


def test_a_replica_that_can_not_exchange_neither_offers_nor_imports_but_counts(tmp_path):
    a, b = Replica(tmp_path, "replica-0"), Replica(tmp_path, "replica-1", status="hybrid")
    with closing(a.half), closing(b.half):
        a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
        b.prefill(Request("s", list(PROMPT)), [5, 6, 7, 8])
        assert b.reader.cached_blocks() == 0
        assert b.counted()["computed_tokens"] == 14
        assert "imports" not in b.counted()


def test_the_longest_of_several_holders_is_chosen(tmp_path):
    replicas = [Replica(tmp_path, f"replica-{i}") for i in range(3)]
    replicas[0].prefill(Request("r", PROMPT[:9]), [1, 2, 3])
    replicas[1].prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    assert replicas[2].half.match(Request("s", list(PROMPT)), 0) == 12
    for replica in replicas:
        replica.half.close()


def test_a_reset_of_the_prefix_cache_withdraws_everything_and_running_requests_stay_out(pair):
    a, b = pair
    pool = SimpleNamespace(cached_block_hash_to_block={})
    a.half.bind_pool(pool)
    running = Request("r", list(PROMPT))
    a.prefill(running, [5, 6, 7, 8])
    pool.cached_block_hash_to_block = {}
    for computed in (14, 15, 16):
        meta = a.schedule(cached=[(running, None, computed, 1)])
        running.all_token_ids.append(3)
        a.done(meta.step)
    assert a.reader.cached_blocks() == 0
    assert b.half.match(Request("s", list(PROMPT)), 0) == 0


@pytest.mark.parametrize("told", [True, False])
def test_the_first_import_after_a_reset_is_counted_and_offered(pair, told):
    a, b = pair
    pool = SimpleNamespace(cached_block_hash_to_block={})
    b.half.bind_pool(pool)
    a.prefill(Request("r1", list(PROMPT)), [1, 2, 3, 4])
    pool.cached_block_hash_to_block = {}
    if told:  # vLLM resets the connector only when asked to
        b.half.reset()
    request = Request("s", list(PROMPT))
    _, meta = import_all(b, request, [5, 6, 7, 8])
    b.done(meta.step, s=report())
    run_on(b, request, [5, 6, 7, 8], 12)
    counted = b.counted()
    assert (counted["imports"], counted["peer_tokens_shared_memory"]) == (1, 12)
    assert b.held(PROMPT) == [5, 6, 7]


def test_an_allocation_that_was_not_planned_still_ends_as_a_failed_import(pair):
    _, b = pair
    request = Request("s", list(PROMPT))
    assert b.half.match(request, 0) == 0
    b.half.allocated(request, ([20, 21, 22, 23],), 12)
    (job,) = b.schedule().imports
    assert (job.source, len(job)) == ("", 3)


def test_an_owner_whose_memory_can_never_be_read_is_not_asked_for_ever(pair):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    nothing = ImportReport(frozenset({20, 21, 22}), 0, 0, 0, "unreachable")
    for n in range(UNREADABLE_MAX):
        tokens, meta = import_all(b, Request(f"s{n}", list(PROMPT)), [20, 21, 22, 23])
        assert tokens == 12
        b.half.report(WorkerReport(meta.step, {f"s{n}": nothing}, {f"s{n}": 1}))
    assert b.half.match(Request("t", list(PROMPT)), 0) == 0


def test_an_adapter_whose_files_changed_has_other_keys(pair, tmp_path):
    a, b = pair
    folder = tmp_path / "adapter"
    folder.mkdir()
    lora = SimpleNamespace(lora_name="adapter", lora_path=str(folder))
    (folder / "adapter_model.safetensors").write_bytes(b"one")
    a.prefill(Request("r", list(PROMPT), lora_request=lora), [5, 6, 7, 8])
    (folder / "adapter_model.safetensors").write_bytes(b"another")
    assert a.half.match(Request("u", list(PROMPT), lora_request=lora), 0) == 0
    assert b.half.match(Request("s", list(PROMPT), lora_request=lora), 0) == 0
    assert b.half.match(Request("v", list(PROMPT)), 0) == 0


def test_a_withdrawn_replica_offers_and_imports_nothing_any_more(pair):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    a.half.withdraw()
    assert a.reader.cached_blocks() == 0
    a.prefill(Request("q", list(range(20))), [1, 2, 3, 4, 5])
    assert a.reader.cached_blocks() == 0
    assert b.half.match(Request("s", list(PROMPT)), 0) == 0


def test_states_travel_with_the_job_as_they_were_looked_up(pair):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    _, meta = import_all(b, Request("s", list(PROMPT)), [20, 21, 22, 23])
    (job,) = meta.imports
    assert a.reader.unchanged(job.source_blocks, job.states).all()
    a.half.table.invalidate([6])
    assert np.flatnonzero(~a.reader.unchanged(job.source_blocks, job.states)).tolist() == [1]
