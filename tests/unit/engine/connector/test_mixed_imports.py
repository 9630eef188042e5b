"""Imports from several sources in one request: head from disk, middle from a peer, tail from host memory."""

from contextlib import ExitStack, closing
from dataclasses import replace
from types import SimpleNamespace

import pytest

from engine.connector.step_messages import WorkerReport
from tests.unit.engine.connector.scheduler_fixtures import PROMPT, SIZE, Replica, Request, by_group, keys_of, report, run_on
from tests.unit.engine.connector.test_several_groups import PROMPT as LONG
from tests.unit.engine.connector.test_several_groups import WINDOWS, owner_of_windows, request
from tests.unit.transport.table_fixtures import writer
from transport.table.deliveries import DeliveryReason, EngineLoad, FromSource
from transport.table.quality import CODED, IN_CODE, LATER, LOSSY, QUALITY, lossy_salt

IDS = [20, 21, 22, 23]
SOURCES = ("disk", "replica-0", "replica-0.host-memory")


@pytest.fixture
def places(tmp_path):
    """A block of PROMPT in each of three tables."""
    with ExitStack() as stack:
        tables = [stack.enter_context(closing(writer(tmp_path, name, 8))) for name in SOURCES]
        for place, table in enumerate(tables):
            table.publish([5 + place], keys_of(PROMPT)[place : place + 1])
        yield tables


@pytest.fixture
def b(tmp_path, places):
    made = Replica(tmp_path, "b")
    with closing(made.half):
        yield made


def begun(b, name="s", ids=IDS, tokens=None):
    """Begin the import of PROMPT, or of so many tokens of what was planned; the request and the step."""
    asked = Request(name, list(PROMPT), {"peerkv": {"tag": 77, "source": "disk"}})
    planned = b.half.match(asked, 0)
    assert planned == 3 * SIZE
    b.half.allocated(asked, by_group(ids), tokens or planned)
    return asked, b.schedule()


def told(*failed, stale=0):
    """The report of three sources of which these blocks failed."""
    one, *others = (report([block] if block in failed else [], stale if block in failed else 0) for block in IDS[:3])
    return replace(one, further=tuple(others))


def record(b):
    (only,) = b.reader.deliveries(0)[1]
    return only


def test_each_source_has_a_job_of_its_own_and_all_begin_at_once(b, places):
    _, meta = begun(b)
    assert [(job.id, job.source, job.epoch) for job in meta.imports] == [
        (("s", number), name, table.epoch) for number, (name, table) in enumerate(zip(SOURCES, places, strict=True))
    ]
    assert [(job.source_blocks.tolist(), job.target_blocks.tolist()) for job in meta.imports] == [
        ([5], [20]),
        ([6], [21]),
        ([7], [22]),
    ]
    assert b.reader.load().imports_under_way == 1


def test_what_came_from_each_is_counted_recorded_and_offered_onward(b):
    asked, meta = begun(b)
    b.done(meta.step, s=told())
    run_on(b, asked, IDS, 12)
    found, counted = record(b), b.counted()
    assert (found.local_tokens, found.peer_tokens, found.computed_tokens, found.planned_tokens) == (0, 12, 2, 12)
    assert found.sources() == tuple(FromSource(name, SIZE) for name in SOURCES)
    assert (found.import_bytes, found.import_ns, found.why) == (3000, 1500, DeliveryReason.NONE)
    kinds = ("tier_tokens_disk", "peer_tokens_shared_memory", "tier_tokens_host_memory", "computed_tokens")
    assert [counted[kind] for kind in kinds] == [4, 4, 4, 2]
    assert (counted["imports"], counted["import_blocks"], counted.get("fallbacks", 0)) == (3, 3, 0)
    assert [(each.name, each.imports, each.blocks, each.failures) for each in b.reader.peers()] == [
        (name, 1, 1, 0) for name in SOURCES
    ]
    assert b.held(PROMPT) == [20, 21, 22]


@pytest.mark.parametrize(
    ("failed", "peer", "came", "failures"),
    [
        ((20,), 0, (), (1, 0, 0)),
        ((21,), 4, ("disk",), (0, 1, 0)),
        ((22,), 8, ("disk", "replica-0"), (0, 0, 1)),
        ((20, 22), 0, (), (1, 0, 1)),
    ],
)
def test_behind_a_block_that_failed_nothing_is_used_and_each_source_answers_for_its_own(b, failed, peer, came, failures):
    asked, meta = begun(b)
    b.done(meta.step, s=told(*failed, stale=1))
    assert b.half.match(asked, 0) == 0  # vLLM asks again
    run_on(b, asked, IDS, peer)
    found, counted = record(b), b.counted()
    assert (found.peer_tokens, found.computed_tokens, found.why) == (peer, 14 - peer, DeliveryReason.CHECK_FAILED)
    assert tuple(each.source for each in found.sources()) == came
    assert (found.source, found.failed_blocks, found.stale_blocks) == ("disk", len(failed), len(failed))
    assert (counted["fallbacks"], counted["check_failures"]) == (1, len(failed))
    assert tuple(each.failures for each in b.reader.peers()) == failures
    assert sum(each.blocks for each in b.reader.peers()) == peer // SIZE
    assert b.reader.load() == EngineLoad(running_requests=1, decoding_requests=1)


def test_a_source_of_which_nothing_can_be_read_is_given_up_and_not_the_others(b):
    for number in range(3):
        _, meta = begun(b, f"s{number}")
        unread = replace(report([21]), bytes=0)
        b.done(meta.step, **{f"s{number}": replace(report(), further=(unread, report()))})
    assert b.half.match(Request("t", list(PROMPT), {"peerkv": {"source": "disk"}}), 0) == SIZE


def test_with_several_ranks_each_sources_report_is_the_worse_of_theirs(tmp_path, places):
    b = Replica(tmp_path, "b", ranks=2)
    with closing(b.half):
        asked, meta = begun(b)
        b.done(meta.step, s=told(21, stale=1))
        assert "imports" not in b.counted()
        b.done(meta.step + 1, s=told(22, stale=1))
        run_on(b, asked, IDS, 4)
        assert record(b).sources() == (FromSource("disk", 4),)
        assert [each.bytes for each in b.reader.peers()] == [2000] * 3


@pytest.mark.parametrize(("tokens", "sources"), [(4, 1), (8, 2), (12, 3)])
def test_of_what_was_planned_only_what_vllm_takes_begins(b, tokens, sources):
    asked, meta = begun(b, tokens=tokens)
    assert [job.source for job in meta.imports] == list(SOURCES[:sources])
    reports = [report() for _ in range(sources)]
    b.done(meta.step, s=replace(reports[0], further=tuple(reports[1:])))
    run_on(b, asked, IDS, tokens)
    assert record(b).peer_tokens == tokens


def test_what_does_not_fit_in_the_blocks_that_vllm_gave_is_given_up_in_one_job(b):
    asked, meta = begun(b, ids=[20, 21])
    (job,) = meta.imports
    assert (job.source, job.id) == ("", ("s", 0))
    b.done(meta.step, s=report([20, 21]))
    run_on(b, asked, IDS, 0)
    assert record(b).why is DeliveryReason.ALLOCATION


def test_a_request_that_is_aborted_meanwhile_leaves_nothing(b):
    _, meta = begun(b)
    b.half.finished("s", aborted=True)
    b.done(meta.step, s=told(21, stale=1))
    assert b.reader.load() == EngineLoad()
    assert b.counted()["imports"] == 3


def test_a_reset_meanwhile_settles_none_of_it(b):
    pool = SimpleNamespace(cached_block_hash_to_block={}, blocks=[])
    b.half.bind_pool(pool)
    _, meta = begun(b)
    b.half.reset()
    b.done(meta.step, s=told())
    assert "imports" not in b.counted()
    assert b.held(PROMPT) == []


def test_blocks_of_the_first_sources_are_entered_while_the_last_ones_are_on_their_way(b):
    entered = []
    b.half.bind_cache(lambda request, tokens: entered.append((request.request_id, tokens)))
    begun(b)
    for blocks in (1, 2):
        b.half.report(WorkerReport(1, checked={"s": blocks}))
    assert entered == [("s", 4), ("s", 8)]


def test_a_prefix_that_is_here_is_completed_by_two(b):
    asked = Request("s", list(PROMPT), {"peerkv": {"source": "disk"}})
    assert b.half.match(asked, SIZE) == 2 * SIZE  # what disk holds is here
    b.half.allocated(asked, by_group(IDS), 2 * SIZE)
    assert [(job.source, job.target_blocks.tolist()) for job in b.schedule().imports] == [
        ("replica-0", [21]),
        ("replica-0.host-memory", [22]),
    ]


def test_a_limit_ends_the_last_source_too(b):
    asked = Request("s", list(PROMPT), {"peerkv": {"source": "disk", "tokens": 8}})
    assert b.half.match(asked, 0) == 8
    b.half.allocated(asked, by_group(IDS), 8)
    meta = b.schedule()
    assert [job.source for job in meta.imports] == ["disk", "replica-0"]


def test_a_mix_with_a_part_that_lost_something_is_offered_as_such_and_to_nobody_exact(b, places):
    salt = lossy_salt("t")
    for place, (table, bits) in enumerate(zip(places, (LOSSY, LOSSY | CODED | LATER | IN_CODE, LOSSY | LATER), strict=True)):
        table.publish([place], keys_of(PROMPT, salt)[place : place + 1], bits)
    asked = Request("s", list(PROMPT), {"peerkv": {"source": "disk"}}, cache_salt=salt)
    assert b.half.match(asked, 0) == 12
    b.half.allocated(asked, by_group(IDS), 12)
    b.done(b.schedule().step, s=told())
    run_on(b, asked, IDS, 12)
    _, _, states = b.reader.look_up(keys_of(PROMPT, salt))
    assert [int(state) & QUALITY for state in states] == [LOSSY, LOSSY | CODED | LATER, LOSSY | LATER]
    exact = Request("e", list(PROMPT), {"peerkv": {"source": "disk"}}, cache_salt="t")
    assert b.half.match(exact, 0) == 0


def test_a_model_with_several_groups_has_one_source(tmp_path):
    a, c = owner_of_windows(tmp_path), owner_of_windows(tmp_path, "c")
    a.half.table.invalidate([4, 13])
    taker = Replica(tmp_path, "b", groups=WINDOWS)
    c.half.table.invalidate([11])  # has what follows, and not the begin
    asked = request(prompt=LONG, source="a")
    tokens = taker.half.match(asked, 0)
    assert 0 < tokens < 16
    assert len(taker.half._sequences["r"].planned) == 1
    for each in (a, c, taker):
        each.half.close()
