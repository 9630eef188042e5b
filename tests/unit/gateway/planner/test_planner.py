"""The planner: from a body to a replica, a source and token ids, over real tables and a tiny tokenizer."""

import time
from typing import Any

import pytest

from engine.fleet import ReplicaState
from gateway.block_registry.fleet_state import EMPTY
from gateway.errors import ApiError, InvalidRequest, NoReplicaReady, PromptTooLong, ReplicaNotReady, UnknownReplica
from gateway.planner.planner import Planner
from gateway.planner.ready import with_ready
from gateway.prompts.parity import KindVerdict, Parity, ParityVerdict
from gateway.prompts.prompt_reader import PromptReader
from gateway.relay.engine_body import engine_body
from gateway.steering.costs.priors import TRANSPORT_PRIORS
from gateway.tenants.tenants import ANONYMOUS
from gateway.upstream.served_models import ServedModels
from tests.unit.gateway.planner.planned_fleet import EXACT, IDS, LONG, TENANT, Bounds, Place
from tests.unit.transport.replica_tables import BLOCK_SIZE
from transport.table.deliveries import Delivery, DeliveryReason
from transport.table.directory import TableDirectory


async def test_a_request_goes_to_the_holder_of_its_prefix(place: Place) -> None:
    place.tables.hold("b", IDS)
    plan = await place.plan(IDS)
    assert (plan.replica.name, plan.source, plan.prompt_tokens, plan.predicted_tokens) == ("b", None, 21, 20)
    assert plan.kv_transfer_params == {"peerkv": {"source": "", "tag": plan.tag}}
    assert plan.prompt is None
    assert plan.cache_salt is None


async def test_a_busy_holder_becomes_the_source_of_a_free_replica(place: Place) -> None:
    place.tables.hold("b", LONG)
    await place.occupy("b")
    assert place.planner.in_flight() == {"b": 1}
    plan = await place.plan(LONG)
    assert (plan.replica.name, plan.source, plan.predicted_tokens) == ("a", "b", 600)
    assert plan.kv_transfer_params == {"peerkv": {"source": "b", "tag": plan.tag}}


@pytest.mark.parametrize("why", [DeliveryReason.SOURCE_UNREADABLE, DeliveryReason.NOT_EXCHANGING])
async def test_a_source_that_the_engine_refused_is_offered_to_it_no_more(place: Place, why: DeliveryReason) -> None:
    """Two GPUs without a way between them: each import that is planned would be a prompt computed whole."""
    place.tables.hold("b", LONG)
    await place.occupy("b")
    plan = await place.plan(LONG)
    assert plan.source == "b"
    place.begin(plan)
    place.tables.writers["a"].deliver(
        Delivery(tag=plan.tag, scheduled_ns=1, first_token_ns=2, prompt_tokens=601, computed_tokens=601, why=why), ""
    )
    place.end(plan)
    assert (await place.plan(LONG, wanted="a")).source is None


async def test_with_imports_switched_off_nobody_is_a_source(place: Place) -> None:
    place.planner = Planner(place.fleet, TableDirectory(place.tables.directory), place.tokens, Bounds(imports=False))
    place.planner.prompts.parity = EXACT
    place.tables.hold("b", LONG)
    await place.occupy("b")
    plans = [await place.plan(LONG), await place.plan(LONG, wanted="a")]
    assert [plan.source for plan in plans] == [None, None]
    assert [plan.kv_transfer_params["peerkv"]["source"] for plan in plans if plan.kv_transfer_params] == ["", ""]


async def test_in_flight_counts_go_back_when_requests_finish(place: Place) -> None:
    plans = [await place.plan(IDS), await place.plan(IDS)]
    for plan in plans:
        place.begin(plan)
    for plan in plans:
        place.end(plan)
    assert place.planner.in_flight() == {}


async def test_requests_that_nobody_holds_spread_by_what_is_in_flight(place: Place) -> None:
    for first in range(4):
        place.begin(await place.plan([first, *LONG]))
    assert place.planner.in_flight() == {"a": 2, "b": 2}


async def test_a_chats_ids_go_with_it_while_they_are_the_engines_and_say_all_of_it(place: Place) -> None:
    async def sent(**body: Any) -> Any:
        body = {"messages": [{"role": "user", "content": "this"}], **body}
        plan = await place.planner.plan("chat", body, ANONYMOUS, wanted_replica="a")
        assert plan.kv_transfer_params is not None
        return plan.kv_transfer_params.get("prompt_token_ids")

    assert await sent() == place.tokens.encode_chat({"messages": [{"role": "user", "content": "this"}]})
    params = {"kv_transfer_params": {"prompt_token_ids": await sent()}}
    assert b'"prompt_token_ids":[0,' in b"".join(engine_body({}, None, None).parts(params))
    assert [await sent(echo=True), await sent(return_prompt_text=True), await sent(a_field_of_tomorrow=1)] == [None] * 3
    place.planner.prompts.parity = ParityVerdict(KindVerdict(Parity.EXACT), KindVerdict(Parity.DEGRADED))
    assert await sent() is None
    place.planner.prompts.parity, place.planner._send_chat_ids = EXACT, False
    assert await sent() is None


async def test_an_empty_text_goes_as_text_for_the_engine_to_refuse(place: Place) -> None:
    assert len(place.tokens.encode("")) == 1  # BOS alone, which it would take
    assert (await place.plan("")).prompt is None
    assert (await place.plan("", max_tokens=1, add_special_tokens=True)).prompt is None


async def test_a_text_goes_as_the_engines_ids(place: Place) -> None:
    expected = place.tokens.encode("hello")
    place.tables.hold("b", place.tokens.encode("hello, this is held"))
    plan = await place.plan("hello, this is held and goes on")
    assert plan.replica.name == "b"
    assert plan.prompt == place.tokens.encode("hello, this is held and goes on")
    assert (await place.plan(["hello", "x"])).prompt == [expected, place.tokens.encode("x")]
    assert (await place.plan(["hello"])).prompt == [expected]
    assert (await place.plan("hello", add_special_tokens=False)).prompt == expected[1:]


@pytest.mark.parametrize("parity", [Parity.UNKNOWN, Parity.DEGRADED, Parity.OFF])
async def test_without_proven_parity_a_text_goes_as_text_and_its_ids_only_steer(place: Place, parity: Parity) -> None:
    place.planner.prompts.parity = ParityVerdict(KindVerdict(parity), KindVerdict(parity))
    place.tables.hold("b", place.tokens.encode("the very same text"))
    plan = await place.plan("the very same text")
    assert (plan.replica.name, plan.prompt) == ("b", None)
    assert plan.kv_transfer_params == {"peerkv": {"tag": plan.tag}}


@pytest.mark.parametrize("field", [{"echo": True}, {"return_token_offsets": True}])
async def test_a_text_that_the_answer_depends_on_goes_as_text(place: Place, field: dict[str, Any]) -> None:
    plan = await place.plan("hello", **field)
    assert (plan.prompt, plan.prompt_tokens) == (None, 6)


@pytest.mark.parametrize("field", [{"suffix": "x"}, {"truncate_prompt_tokens": 3}])
async def test_a_prompt_that_the_engine_changes_is_steered_by_load(place: Place, field: dict[str, Any]) -> None:
    place.tables.hold("b", IDS)
    await place.occupy("b")
    plan = await place.plan(IDS, **field)
    assert (plan.replica.name, plan.prompt, plan.predicted_tokens) == ("a", None, 0)
    assert plan.kv_transfer_params == {"peerkv": {"tag": plan.tag}}
    assert "the engine changes the prompt" in plan.reason


@pytest.mark.parametrize("field", [{"prompt_logprobs": 0}, {"echo": True, "logprobs": 1}])
async def test_a_request_for_the_prompts_logprobs_expects_nothing_from_caches(place: Place, field: dict[str, Any]) -> None:
    place.tables.hold("b", IDS)
    await place.occupy("b")
    plan = await place.plan(IDS, **field)
    assert (plan.replica.name, plan.source, plan.predicted_tokens) == ("a", None, 0)


async def test_a_tenants_salt_goes_into_keys_and_body(place: Place) -> None:
    place.tables.hold("a", IDS)
    place.tables.hold("b", IDS, salt="salty", first_block=50)
    salted = await place.plan(IDS, tenant=TENANT)
    assert (salted.replica.name, salted.cache_salt) == ("b", "salty")
    assert (await place.plan(IDS)).replica.name == "a"


async def test_an_adapter_has_keys_of_its_own(place: Place) -> None:
    cards = {"model": {"id": "model"}, "poet": {"id": "poet", "root": "/loras/poet", "parent": "model"}}
    place.models = ServedModels(b"", cards)
    place.tables.hold("a", IDS)
    place.tables.hold("b", IDS, lora="poet=/loras/poet", first_block=50)
    assert (await place.plan(IDS, model="poet")).replica.name == "b"
    assert (await place.plan(IDS, model="model")).replica.name == "a"


async def test_of_a_list_of_prompts_the_longest_steers(place: Place) -> None:
    place.tables.hold("b", IDS)
    plan = await place.plan([[5, 6], IDS])
    assert (plan.replica.name, plan.prompt_tokens, plan.kv_transfer_params) == ("b", 21, {"peerkv": {"tag": plan.tag}})


async def test_a_chat_is_steered_by_its_rendered_ids_and_goes_as_it_is_with_them_beside_it(place: Place) -> None:
    body = {"messages": [{"role": "user", "content": "tell me of the sea"}]}
    ids = place.tokens.encode_chat(body)
    place.tables.hold("b", ids)
    plan = await place.chat("tell me of the sea")
    assert (plan.replica.name, plan.prompt) == ("b", None)
    assert plan.kv_transfer_params == {"peerkv": {"source": "", "tag": plan.tag}, "prompt_token_ids": ids}
    assert plan.predicted_tokens > 0


async def test_a_chat_is_steered_by_load_when_its_ids_are_known_to_be_wrong(place: Place) -> None:
    place.tables.hold("b", place.tokens.encode_chat({"messages": [{"role": "user", "content": "tell me of the sea"}]}))
    place.planner.prompts.parity = ParityVerdict(KindVerdict(Parity.EXACT), KindVerdict(Parity.OFF))
    plan = await place.chat("tell me of the sea")
    assert (plan.prompt_tokens, plan.predicted_tokens, plan.kv_transfer_params) == (0, 0, {"peerkv": {"tag": plan.tag}})


async def test_media_are_steered_by_load(place: Place) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}
    plan = await place.planner.plan("chat", body, ANONYMOUS)
    assert (plan.prompt_tokens, plan.kv_transfer_params) == (0, {"peerkv": {"tag": plan.tag}})
    assert "only the engine handles" in plan.reason


async def test_embeddings_go_to_the_least_busy_replica(place: Place) -> None:
    place.begin(await place.planner.plan("embeddings", {"input": "x"}, TENANT))
    plan = await place.planner.plan("embeddings", {"input": "x"}, TENANT)
    assert (plan.replica.name, plan.kv_transfer_params, plan.cache_salt) == ("b", None, "salty")


async def test_a_long_prompt_is_tokenised_off_the_event_loop(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    in_thread = PromptReader.in_thread

    async def note(reader: PromptReader, characters: int, function: Any, *given: Any) -> Any:
        moved.append(function.__name__)
        return await in_thread(reader, characters, function, *given)

    monkeypatch.setattr(PromptReader, "in_thread", note)
    await place.plan("x" * 100)
    await place.chat("x" * 60)
    assert moved == []
    assert (await place.plan("x" * 1001)).prompt == place.tokens.encode("x" * 1001)
    await place.chat("y" * 1001)
    assert moved == ["_completion", "_chat"]


async def test_a_plan_says_what_its_ids_take(place: Place) -> None:
    one, several = await place.plan("x" * 10), await place.plan(["x" * 10, "y" * 20])
    assert (one.held_bytes, several.held_bytes) == (11 * 11, 11 * (11 + 21))  # eleven bytes an id, with that of the beginning


async def test_text_seen_before_is_looked_up_on_the_event_loop(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = "A line of words.\n" * 1000
    before = await place.plan(seen)
    monkeypatch.delattr(PromptReader, "in_thread")
    assert (await place.plan(seen)).prompt == before.prompt
    for unseen in ("Z" + seen, ["a"] * 257, [seen, seen]):
        with pytest.raises(AttributeError, match="in_thread"):
            await place.plan(unseen)


async def test_a_prompt_that_does_not_fit_is_refused_before_an_engine_sees_it(place: Place) -> None:
    place.limit(10)
    assert (await place.plan(list(range(10)))).prompt_tokens == 10
    for prompt in (list(range(11)), "x" * 10, "x" * 1000, [[1], list(range(11))]):
        with pytest.raises(PromptTooLong) as refusal:
            await place.plan(prompt)
        assert (refusal.value.status, refusal.value.param) == (400, "prompt")
    with pytest.raises(PromptTooLong) as refusal:
        await place.chat("x" * 50)
    assert refusal.value.param == "messages"


async def test_what_does_not_fit_by_unproven_ids_is_left_to_the_engine(place: Place) -> None:
    place.limit(10)
    place.planner.prompts.parity = ParityVerdict()
    assert (await place.plan("x" * 12)).prompt is None
    assert (await place.plan("x" * 1000)).prompt_tokens == 0
    assert (await place.chat("x" * 50)).prompt is None
    assert (await place.plan("x" * 12, truncate_prompt_tokens=5)).prompt is None


async def test_the_context_length_of_the_parity_check_counts_until_the_models_are_known(place: Place) -> None:
    place.planner.prompts.parity = ParityVerdict(KindVerdict(Parity.EXACT), KindVerdict(), "a", 4)
    with pytest.raises(PromptTooLong):
        await place.plan([1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        [],
        {},
        5,
        [[]],
        [[1], []],
        [1, "a"],
        ["a", 1],
        [True],
        [[True]],
        [1.0],
        [[1.5]],
        [-1],
        [[-1]],
        [2**31],
        [[[1]]],
        [None],
    ],
)
async def test_a_malformed_prompt_is_a_bad_request(place: Place, prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await place.plan(prompt)
    assert (refusal.value.status, refusal.value.param) == (400, "prompt")


@pytest.mark.parametrize("prompt", [[0], [2**31 - 1], [[1], [2, 3]], "", ["", "x"]])
async def test_well_formed_prompts_are_planned(place: Place, prompt: Any) -> None:
    assert (await place.plan(prompt)).replica.name in ("a", "b")


async def test_an_empty_text_is_left_to_the_engine(place: Place) -> None:
    assert (await place.plan("", add_special_tokens=False)).prompt is None


async def test_only_ready_replicas_are_chosen(place: Place) -> None:
    place.tables.hold("b", IDS)
    place.fleet.set("b", ReplicaState.DRAINING)
    plan = await place.plan(IDS)
    assert (plan.replica.name, plan.source) == ("a", None)
    place.fleet.set("a", ReplicaState.STARTING)
    with pytest.raises(NoReplicaReady, match="a is starting; b is draining"):
        await place.plan(IDS)


@pytest.mark.parametrize(
    ("state", "what"),
    [
        (ReplicaState.STARTING, "is starting"),
        (ReplicaState.DRAINING, "is draining"),
        (ReplicaState.BACKOFF, "has ended and is started again soon"),
        (ReplicaState.FAILED, "has failed and stays down until somebody restarts it"),
        (ReplicaState.STOPPED, "is stopped"),
    ],
)
async def test_a_replica_that_is_not_ready_is_told_of_in_english(place: Place, state: ReplicaState, what: str) -> None:
    place.fleet.set("a", state)
    with pytest.raises(ReplicaNotReady) as refused:
        await place.plan(IDS, wanted="a")
    assert refused.value.message == f"Replica 'a' {what}: it takes no requests now."


def test_without_any_replica_it_is_said_who_starts_them() -> None:
    with pytest.raises(NoReplicaReady, match="there are none: `peerkv engine` starts them"):
        with_ready(EMPTY)


async def test_a_pinned_request_goes_where_it_says_and_imports_from_the_best_holder(place: Place) -> None:
    place.tables.hold("b", LONG)
    plan = await place.plan(LONG, wanted="a")
    assert (plan.replica.name, plan.source, plan.predicted_tokens) == ("a", "b", 600)
    plan = await place.plan(LONG, wanted="b")
    assert (plan.replica.name, plan.source) == ("b", None)


async def test_a_pin_to_an_unknown_or_unready_replica_is_an_error(place: Place) -> None:
    with pytest.raises(UnknownReplica):
        await place.plan(IDS, wanted="zz")
    place.fleet.set("b", ReplicaState.BACKOFF)
    with pytest.raises(ReplicaNotReady):
        await place.plan(IDS, wanted="b")


async def test_a_second_plan_avoids_the_lost_replica_and_keeps_what_is_known(place: Place) -> None:
    place.tables.hold("b", IDS)
    first = await place.plan(IDS, tenant=ANONYMOUS)
    again = place.planner.replan(first, exclude={"b"})
    assert (first.replica.name, again.replica.name, again.source, again.prompt_tokens) == ("b", "a", None, 21)
    with pytest.raises(NoReplicaReady):
        place.planner.replan(again, exclude={"a", "b"})


async def test_a_second_plan_of_a_pinned_request_has_nowhere_to_go(place: Place) -> None:
    with pytest.raises(ApiError):
        place.planner.replan(await place.plan(IDS, wanted="b"), exclude={"b"})


async def test_replicas_that_can_not_exchange_import_nothing(place: Place) -> None:
    place.tables.stop("a")
    place.tables.start("a", fields={"weights": "others"})
    place.tables.hold("b", IDS)
    plan = await place.plan(IDS, wanted="a")
    assert (plan.source, plan.predicted_tokens) == (None, 0)


async def test_a_replica_without_a_table_gets_no_hint(place: Place) -> None:
    place.tables.stop("a")
    assert (await place.plan(IDS, wanted="a")).kv_transfer_params is None


async def test_prefixes_are_counted_once_a_request(place: Place) -> None:
    plan = await place.plan(IDS)
    place.planner.replan(plan, exclude=set())
    [(_, tokens, requests, _)] = place.planner.prefixes.top(5)
    assert (tokens, requests) == (20, 1)


async def test_decisions_are_counted(place: Place) -> None:
    place.tables.hold("b", LONG)
    await place.plan(LONG)
    await place.plan(LONG, wanted="a")
    await place.planner.plan("embeddings", {"input": "x"}, ANONYMOUS)
    counts = place.planner.counts
    assert (counts.planned, counts.to_holder, counts.with_source, counts.pinned, counts.without_ids) == (3, 1, 1, 1, 1)
    assert (counts.prompt_tokens, counts.predicted_tokens) == (1202, 1200)


async def test_the_body_stays_as_it_is(place: Place) -> None:
    body = {"prompt": "hello", "model": "m"}
    await place.planner.plan("completions", body, TENANT)
    assert body == {"prompt": "hello", "model": "m"}


async def test_what_left_a_cache_is_restored_from_host_memory(place: Place) -> None:
    place.tables.start("a.host-memory")
    place.tables.hold("a.host-memory", LONG)
    plan = await place.plan(LONG, wanted="a")
    assert (plan.source, plan.predicted_tokens, plan.held_tokens_max) == ("a.host-memory", 600, 600)
    assert plan.kv_transfer_params == {"peerkv": {"source": "a.host-memory", "tag": plan.tag}}
    assert plan.decision.reason.startswith("imports 600 tokens from a.host-memory")
    place.begin(plan)
    assert place.planner.in_flight() == {"a": 1}
    place.end(plan)


@pytest.mark.parametrize("chat", [True, False])
async def test_a_stream_whose_replica_died_goes_on_from_that_replicas_host_memory(place: Place, chat: bool) -> None:
    """The host process owns that memory, and outlives the engine."""
    for name in ("a", "b"):
        place.tables.stop(name)
    for name in ("a", "b", "a.host-memory"):
        place.tables.start(name)
    place.begin(await place.plan(IDS, wanted="b"))  # which leaves a the less busy one
    began = await (place.chat("this that " * 100) if chat else place.plan(LONG))
    assert began.replica.name == "a"
    ids = began.request.known.ids
    assert ids is not None
    place.tables.hold("a.host-memory", ids)
    place.begin(began)
    place.tables.stop("a")
    place.fleet.set("a", ReplicaState.BACKOFF)
    output = [7, 8, 9]
    plan = place.planner.go_on(began, output, chat=chat, prompt=None, exclude={"a"})
    assert plan is not None
    assert (plan.replica.name, plan.source) == ("b", "a.host-memory")
    assert plan.predicted_tokens == len(ids) // BLOCK_SIZE * BLOCK_SIZE
    assert plan.prompt_tokens == len(ids) + len(output)
    sent = (plan.kv_transfer_params or {})["prompt_token_ids"] if chat else plan.prompt
    assert list(sent or ()) == [*ids, *output]


async def test_a_replica_that_holds_all_of_it_restores_nothing(place: Place) -> None:
    place.tables.start("a.host-memory")
    place.tables.hold("a.host-memory", LONG)
    place.tables.hold("b", LONG)
    plan = await place.plan(LONG)
    assert (plan.replica.name, plan.source) == ("b", None)


async def test_a_replica_that_was_restarted_starts_slowly_and_one_that_is_new_does_not(place: Place) -> None:
    names = ["a", "b"]

    def takers() -> list[str]:
        place.planner.fleet.now()
        return list(place.planner.slow_start.takers(names, time.monotonic(), lambda: {"a": 1}))

    await place.plan(IDS)
    assert takers() == names
    place.fleet.set("a", ReplicaState.STARTING, pid=999)
    assert takers() == names
    place.fleet.set("a", pid=999)
    assert takers() == ["b"]
    place.fleet.set("a", ReplicaState.DRAINING, pid=999)
    plan = await place.plan(IDS)
    assert plan.replica.name == "b"


async def test_imports_from_other_nodes_are_expected_to_take_what_the_network_was_measured_at(place: Place) -> None:
    costs = place.planner.costs
    size, (fixed, before) = costs.kv_token_bytes("cpu"), TRANSPORT_PRIORS["tcp"]
    place.planner.fleet.now()
    assert costs.transfer_terms("a", "n:a", "tcp", "cpu") == pytest.approx((fixed, before * size))
    place.fleet.measured(40e9)
    place.planner.fleet.now()
    assert costs.transfer_terms("a", "n:a", "tcp", "cpu") == pytest.approx((fixed, size / 40e9))
