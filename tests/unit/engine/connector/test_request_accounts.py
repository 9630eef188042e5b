"""What the scheduler half tells of each request, and of what there is to do."""

import itertools
from contextlib import closing
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.connector.import_sources import UNREADABLE_MAX
from engine.connector.step_messages import ImportReport, WorkerReport
from tests.unit.engine.connector.scheduler_fixtures import PROMPT, SIZE, Replica, Request, import_all, keys_of, report, run_on
from tests.unit.transport.table_fixtures import FIELDS, writer
from transport.table.deliveries import Delivery, DeliveryReason, EngineLoad


@pytest.fixture
def ticks():
    """A clock that is one nanosecond later whenever it is looked at."""
    return itertools.count(1)


@pytest.fixture
def pair(tmp_path, ticks):
    a, b = (Replica(tmp_path, f"replica-{i}", clock_ns=lambda: next(ticks)) for i in range(2))
    with closing(a.half), closing(b.half):
        yield a, b


def hinted(name="s", tokens=PROMPT, **hint):
    return Request(name, list(tokens), kv_transfer_params={"peerkv": {"tag": 77} | hint})


def records(replica):
    return replica.reader.deliveries(0)[1]


def record(replica) -> Delivery:
    (only,) = records(replica)
    return only


def split(delivery):
    return delivery.local_tokens, delivery.peer_tokens, delivery.computed_tokens


def test_a_cold_prompt_is_recorded_when_its_first_token_is_there(pair):
    a, _ = pair
    request = hinted("r", source="")
    a.half.arrived(request)
    a.half.match(request, 0)
    meta = a.schedule(new=[(request, [5, 6, 7, 8], 0, 14)])
    assert records(a) == []
    request.all_token_ids.append(1)
    a.done(meta.step)
    found = record(a)
    assert (found.tag, found.prompt_tokens, found.why) == (77, 14, DeliveryReason.NO_SOURCE_GIVEN)
    assert split(found) == (0, 0, 14)
    assert 0 < found.arrived_ns < found.asked_ns < found.scheduled_ns < found.first_token_ns
    assert (found.source, found.import_ns, found.import_bytes, found.planned_tokens) == ("", 0, 0, 0)


def test_without_word_of_its_arrival_a_request_arrives_when_it_is_first_looked_up(pair):
    a, _ = pair
    a.prefill(hinted("r"), [5, 6, 7, 8])
    assert record(a).arrived_ns == record(a).asked_ns > 0


def test_a_local_hit_misses_nothing(pair):
    a, _ = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    again = hinted(source="")
    a.prefill(again, [5, 6, 7, 9], computed=12)
    found = records(a)[1]
    assert (split(found), found.why) == ((12, 0, 2), DeliveryReason.NONE)


def test_an_import_is_recorded_with_its_source_its_bytes_and_its_times(pair, ticks):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    request = hinted(source="replica-0")
    tokens, meta = import_all(b, request, [20, 21, 22, 23])
    assert b.reader.load().imports_under_way == 1
    begun = next(ticks)
    b.done(meta.step, s=report())
    ended = next(ticks)
    assert b.reader.load().imports_under_way == 0
    run_on(b, request, [20, 21, 22, 23], tokens)
    found = record(b)
    assert (split(found), found.why) == ((0, 12, 2), DeliveryReason.NONE)
    assert (found.source, found.planned_tokens, found.import_bytes, found.import_ns) == ("replica-0", 12, 1000, 500)
    assert found.asked_ns < found.scheduled_ns - found.import_wait_ns < begun
    assert ended - begun < found.import_wait_ns  # to the first step, not to the end of the copy
    (peer,) = b.reader.peers()
    assert (peer.name, peer.transport, peer.imports, peer.blocks, peer.bytes) == ("replica-0", "shared_memory", 1, 3, 1000)
    assert (peer.seconds, peer.failures) == (500e-9, 0)


@pytest.mark.parametrize("whole", [True, False])
def test_an_import_from_another_node_is_told_apart_from_those_of_this_node(tmp_path, whole):
    """Between nodes KV comes by their agents, whatever a replica reads its peers by."""
    a, b = Replica(tmp_path, "node-b:replica-0"), Replica(tmp_path, "replica-1")
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    request = hinted(source="node-b:replica-0")
    tokens, meta = import_all(b, request, [20, 21, 22, 23])
    if whole:
        b.done(meta.step, s=report())
        run_on(b, request, [20, 21, 22, 23], tokens)
    else:  # its client left: it is told of before the copy has ended
        b.half.finished("s", aborted=True)
    (peer,) = b.reader.peers()
    assert (peer.name, peer.transport, peer.imports) == ("node-b:replica-0", "network", int(whole))


@pytest.mark.parametrize(("limit", "local", "peer"), [(8, 0, 8), (11, 0, 8), (4, 0, 4), (3, 0, 0), (0, 0, 0), (8, 4, 4)])
def test_a_hint_splits_a_prompt_into_what_is_imported_and_what_is_computed(pair, limit, local, peer):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    request = hinted(source="replica-0")
    request.kv_transfer_params["peerkv"]["tokens"] = limit
    assert b.half.match(request, local) == peer
    if peer:
        b.half.allocated(request, ([20, 21, 22, 23],), peer)
        b.done(b.schedule().step, s=report())
    run_on(b, request, [20, 21, 22, 23], local + peer)
    assert split(record(b)) == (local, peer, 14 - local - peer)
    assert record(b).why is DeliveryReason.LIMITED


def test_a_limit_beyond_what_there_is_limits_nothing(pair):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    request = hinted(source="replica-0")
    request.kv_transfer_params["peerkv"]["tokens"] = 12
    assert b.half.match(request, 0) == 12
    b.half.allocated(request, ([20, 21, 22, 23],), 12)
    b.done(b.schedule().step, s=report())
    run_on(b, request, [20, 21, 22, 23], 12)
    assert record(b).why is DeliveryReason.NONE


@pytest.mark.parametrize(
    ("failed", "stale", "copied", "why", "peer"),
    [
        ([21], 1, 1000, DeliveryReason.CHECK_FAILED, 4),
        ([20, 21, 22], 0, 1000, DeliveryReason.COPY_FAILED, 0),
        ([20, 21, 22], 0, 0, DeliveryReason.COPY_FAILED, 0),
    ],
)
def test_an_import_that_falls_short_says_how(pair, failed, stale, copied, why, peer):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    request = hinted(source="replica-0")
    _, meta = import_all(b, request, [20, 21, 22, 23])
    b.done(meta.step, s=ImportReport(frozenset(failed), stale, copied, 500, "changed"))
    assert b.half.match(request, 0) == 0  # vLLM asks again
    run_on(b, request, [20, 21, 22, 23], peer)
    found = record(b)
    assert (split(found), found.why) == ((0, peer, 14 - peer), why)
    assert (found.source, found.planned_tokens) == ("replica-0", 12)
    assert (found.stale_blocks, found.failed_blocks) == (stale, len(failed))
    assert b.reader.peers()[0].failures == 1


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"skip_reading_prefix_cache": True}, DeliveryReason.READS_NO_CACHE),
        ({"pooling_params": object()}, DeliveryReason.READS_NO_CACHE),
        ({"kv_transfer_params": {"peerkv": {"source": ""}}}, DeliveryReason.NO_SOURCE_GIVEN),
        ({"kv_transfer_params": {"peerkv": {"source": "replica-7"}}}, DeliveryReason.SOURCE_GONE),
        ({"cache_salt": "another tenant's"}, DeliveryReason.SOURCE_HELD_LESS),
        ({"all_token_ids": [1, 2, 3]}, DeliveryReason.NONE),
    ],
)
def test_what_kept_a_request_from_importing_is_recorded(pair, changed, why):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    b.prefill(Request(**{"request_id": "s", "all_token_ids": list(PROMPT)} | changed), [20, 21, 22, 23])
    assert record(b).why is why
    assert record(b).computed_tokens == record(b).prompt_tokens


def test_a_source_that_held_less_brings_what_it_has_and_is_recorded_so(pair):
    a, b = pair
    a.prefill(Request("r", PROMPT[:9]), [5, 6, 7])
    request = hinted(source="replica-0")
    tokens, meta = import_all(b, request, [20, 21, 22, 23])
    b.done(meta.step, s=report())
    run_on(b, request, [20, 21, 22, 23], tokens)
    assert (split(record(b)), record(b).why) == ((0, 8, 6), DeliveryReason.SOURCE_HELD_LESS)


@pytest.mark.parametrize("where", ["here", "there"])
def test_without_an_exchange_that_is_the_reason(tmp_path, where):
    b = Replica(tmp_path, "replica-1", status="hybrid" if where == "here" else "ok")
    fields = FIELDS | ({"dtype": "float16"} if where == "there" else {})
    with closing(b.half), closing(writer(tmp_path, "replica-0", fields=fields)) as other:
        other.publish([1, 2, 3], keys_of(PROMPT))
        b.prefill(hinted(source="replica-0"), [20, 21, 22, 23])
        assert record(b).why is DeliveryReason.NOT_EXCHANGING


def test_a_source_that_can_not_be_read_is_the_reason_once_it_is_asked_no_more(pair):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    for n in range(UNREADABLE_MAX):
        _, meta = import_all(b, Request(f"s{n}", list(PROMPT)), [20, 21, 22, 23])
        b.done(meta.step, **{f"s{n}": ImportReport(frozenset({20, 21, 22}), 0, 0, 0, "unreachable")})
    b.prefill(hinted(source="replica-0"), [20, 21, 22, 23])
    assert record(b).why is DeliveryReason.SOURCE_UNREADABLE


def test_an_import_that_was_planned_but_not_allocated_is_recorded_so(pair):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    request = hinted(source="replica-0")
    assert b.half.match(request, 0) == 12
    run_on(b, request, [20, 21, 22, 23], 0)
    assert (record(b).why, record(b).planned_tokens) == (DeliveryReason.ALLOCATION, 12)


def test_a_request_that_is_aborted_while_it_waits_leaves_a_record_without_times_of_a_step(pair):
    a, _ = pair
    request = hinted("r")
    a.half.arrived(request)
    a.half.finished("r", aborted=True)
    found = record(a)
    assert (found.tag, found.prompt_tokens, found.arrived_ns > 0) == (77, 14, True)
    assert (found.asked_ns, found.scheduled_ns, found.first_token_ns, found.computed_tokens) == (0, 0, 0, 0)
    assert a.reader.load() == EngineLoad()


@pytest.mark.parametrize("aborted", [True, False])
def test_a_request_that_ends_with_its_first_step_is_recorded_when_that_is_reported(pair, aborted):
    """vLLM forgets a request before it hands on the report of its last step."""
    a, _ = pair
    request = hinted("r")
    a.half.arrived(request)
    a.half.match(request, 0)
    meta = a.schedule(new=[(request, [5, 6, 7, 8], 0, 14)])
    request.all_token_ids.append(1)
    a.half.finished("r", aborted=aborted)
    assert records(a) == []
    a.done(meta.step)
    assert (record(a).first_token_ns == 0) is aborted
    assert a.reader.load() == EngineLoad()


def test_a_request_that_is_aborted_between_its_prompts_parts_leaves_one_record(pair):
    a, _ = pair
    request = hinted("r")
    a.half.match(request, 0)
    meta = a.schedule(new=[(request, [5, 6], 0, 6)])
    a.half.finished("r", aborted=True)
    a.done(meta.step)
    assert (record(a).scheduled_ns > 0, record(a).first_token_ns) == (True, 0)
    assert a.reader.load() == EngineLoad()


def test_with_two_steps_under_way_a_record_waits_for_its_own(pair):
    a, _ = pair
    request, other = hinted("r"), hinted("o", tokens=range(50, 60))
    for each in (request, other):
        a.half.arrived(each)
        a.half.match(each, 0)
    first = a.schedule(new=[(request, [5, 6, 7, 8], 0, 14)])
    second = a.schedule(new=[(other, [9, 10, 11], 0, 10)], cached=[(request, None, 14, 1)])
    request.all_token_ids.append(1)
    a.done(first.step)
    assert [each.prompt_tokens for each in records(a)] == [14]
    a.done(second.step)
    assert [each.prompt_tokens for each in records(a)] == [14, 10]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_preempted_and_resumed_request_leaves_one_record_of_its_first_run(pair, runner):
    a, _ = pair
    request = hinted("r", source="")
    a.prefill(request, [5, 6, 7, 8])
    a.schedule(preempted=["r"])
    assert a.reader.load() == EngineLoad(waiting_requests=1, waiting_tokens=14)
    a.half.match(request, 0)
    if runner == "v1":
        meta = a.schedule(cached=[(request, [15, 16, 17, 18], 0, 15)], resumed=["r"])
    else:
        meta = a.schedule(new=[(request, [15, 16, 17, 18], 0, 15)])
    request.all_token_ids.append(2)
    a.done(meta.step)
    assert split(record(a)) == (0, 0, 14)
    assert a.reader.load() == EngineLoad(running_requests=1, decoding_requests=1)
    a.half.finished("r")
    assert len(records(a)) == 1
    assert a.reader.load() == EngineLoad()


def test_a_request_that_is_preempted_before_its_first_token_is_recorded_with_it(pair):
    a, _ = pair
    request = hinted("r")
    a.half.match(request, 0)
    a.done(a.schedule(new=[(request, [5, 6], 0, 6)]).step)
    a.schedule(preempted=["r"])
    meta = a.schedule(cached=[(request, [15, 16, 17, 18], 0, 14)], resumed=["r"])
    assert records(a) == []
    request.all_token_ids.append(2)
    a.done(meta.step)
    assert record(a).first_token_ns > 0


def test_the_load_follows_a_request_from_its_arrival_to_its_end(pair):
    a, _ = pair
    request = hinted("r")
    a.half.arrived(request)
    assert a.reader.load() == EngineLoad(waiting_requests=1, waiting_tokens=14)
    a.half.match(request, 4)
    assert a.reader.load().waiting_tokens == 14  # told with the step
    first = a.schedule(new=[(request, [5, 6], 4, 4)])
    assert a.reader.load() == EngineLoad(running_requests=1, waiting_tokens=10)  # 4 are being computed
    a.done(first.step)
    assert a.reader.load() == EngineLoad(running_requests=1, waiting_tokens=6)
    second = a.schedule(cached=[(request, [7, 8], 8, 6)])
    assert a.reader.load() == EngineLoad(running_requests=1, waiting_tokens=6, decoding_requests=1)
    request.all_token_ids.append(1)
    a.done(second.step)
    assert a.reader.load() == EngineLoad(running_requests=1, decoding_requests=1)
    a.done(a.schedule(cached=[(request, None, 14, 1)]).step)
    a.half.finished("r")
    assert a.reader.load() == EngineLoad()


def test_what_is_about_to_be_imported_does_not_wait_and_does_again_if_that_fails(pair):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    request = hinted(source="replica-0")
    b.half.arrived(request)
    _, meta = import_all(b, request, [20, 21, 22, 23])
    assert b.reader.load() == EngineLoad(waiting_requests=1, waiting_tokens=2, imports_under_way=1)
    b.done(meta.step, s=report(failed=[21], stale=1))
    assert b.reader.load() == EngineLoad(waiting_requests=1, waiting_tokens=10)


def test_an_import_that_fails_after_its_request_was_aborted_leaves_nothing_that_waits(pair):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    request = hinted(source="replica-0")
    _, meta = import_all(b, request, [20, 21, 22, 23])
    b.half.finished("s", aborted=True)
    b.done(meta.step, s=ImportReport(frozenset({21, 22}), 0, 1000, 500, "its owner ended"))
    assert b.reader.load() == EngineLoad()


def test_malformed_fields_of_a_hint_are_counted_once_and_the_rest_holds(pair):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    request = hinted(source="replica-0", pin={"id": "x"}, unpin=7)
    b.half.arrived(request)
    assert b.half.match(request, 0) == b.half.match(request, 0) == 12
    assert b.counted()["hints_malformed"] == 2


def test_a_fault_while_a_request_is_taken_note_of_is_its_own(pair):
    a, _ = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    with pytest.raises(AttributeError):
        a.half.arrived(SimpleNamespace(request_id="odd"))
    assert a.half.match(Request("s", list(PROMPT)), 12) == 0
    assert a.held(PROMPT) == [5, 6, 7]


class Engine:
    """A scheduler that does with a few requests what it is told, as far as it makes sense, with reports that lag a step."""

    def __init__(self, replica):
        self.replica, self.reports, self.requests, self.seen = replica, [], {}, []
        self.arrived = 0

    def do(self, action, which, amount):
        if action == "arrive":
            self.arrived += 1
            name = f"r{self.arrived}"
            request = Request(name, list(range(10 + amount)), kv_transfer_params={"peerkv": {"tag": self.arrived}})
            self.requests[name] = [request, 0, "waiting"]
            self.seen.append(request)
            self.replica.half.arrived(request)
            return
        if action == "report":
            if self.reports:
                self._report(*self.reports.pop(0))
            return
        waiting = [name for name, (_, _, state) in self.requests.items() if state != "running"]
        running = [name for name, (_, _, state) in self.requests.items() if state == "running"]
        names = {"start": waiting, "run": running, "preempt": running}.get(action, list(self.requests))
        if not names:
            return
        name = names[which % len(names)]
        getattr(self, "_" + action)(name, amount)

    def _start(self, name, amount):
        request, _, state = self.requests[name]
        self.replica.half.match(request, 0)
        tokens = min(amount + 1, request.num_tokens)
        blocks = list(range(-(-tokens // SIZE)))
        if state == "preempted" and amount % 2:  # as model runner V1 tells it
            meta = self.replica.schedule(cached=[(request, blocks, 0, tokens)], resumed=[name])
        else:
            meta = self.replica.schedule(new=[(request, blocks, 0, tokens)])
        self._ran(name, tokens, meta)

    def _run(self, name, amount):
        request, computed, _ = self.requests[name]
        tokens = min(amount + 1, max(1, request.num_tokens - computed))
        self._ran(name, computed + tokens, self.replica.schedule(cached=[(request, None, computed, tokens)]))

    def _ran(self, name, computed, meta):
        self.requests[name][1:] = [computed, "running"]
        self.reports.append((meta.step, self.requests[name][0] if computed >= self.requests[name][0].num_tokens else None))

    def _preempt(self, name, amount):
        self.requests[name][1:] = [0, "preempted"]
        self.reports.append((self.replica.schedule(preempted=[name]).step, None))

    def _abort(self, name, amount):
        del self.requests[name]
        self.replica.half.finished(name, aborted=True)

    def _finish(self, name, amount):
        del self.requests[name]
        self.replica.half.finished(name, aborted=False)

    def _report(self, step, request):
        if request is not None:
            request.all_token_ids.append(7)
        self.replica.half.report(WorkerReport(step))


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "start", "start", "run", "run", "report", "report", "preempt", "abort", "finish"]),
        st.integers(0, 3),
        st.integers(0, 20),
    ),
    max_size=60,
)


@given(ACTIONS)
@settings(max_examples=150, deadline=None)
def test_whatever_happens_each_request_leaves_one_record_and_nothing_is_left_to_do(tmp_path_factory, actions):
    replica = Replica(tmp_path_factory.mktemp("t"), "replica-0")
    with closing(replica.half):
        engine = Engine(replica)
        for action in actions:
            engine.do(*action)
            load = replica.reader.load()
            states = [state for _, _, state in engine.requests.values()]
            assert load.running_requests == states.count("running")
            assert load.waiting_requests == len(states) - states.count("running")
            assert load.decoding_requests <= load.running_requests
            # what is preempted while a step computes it is being computed, and has to be computed again
            waiting = sum(each.num_prompt_tokens for each, _, _ in engine.requests.values())
            under_way = len(engine.reports) * max((each.num_prompt_tokens for each in engine.seen), default=0)
            assert 0 <= load.waiting_tokens <= waiting + under_way
        for name in list(engine.requests):
            engine.do("finish", list(engine.requests).index(name), 0)
        while engine.reports:
            engine.do("report", 0, 0)
        assert replica.reader.load() == EngineLoad()
        found = records(replica)
        assert sorted(each.tag for each in found) == list(range(1, engine.arrived + 1))
        for each in found:
            assert sum(split(each)) == (each.prompt_tokens if each.scheduled_ns else 0)
