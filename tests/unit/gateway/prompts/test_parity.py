"""The comparison of token ids with an engine's own, over a real unix socket."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from engine.fleet import ReplicaState
from gateway.planner.planner import Planner
from gateway.prompts.canaries import ANSWERED_CHATS, ANSWERED_TOOL_CHATS, CHATS, COMPLETIONS, TOOL_CHATS
from gateway.prompts.parity import (
    KindVerdict,
    Parity,
    ParityCheckFailed,
    ParityCounts,
    check_parity,
    compare,
)
from gateway.prompts.parity_watch import ParityWatch
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import NoTokenIds, TokenService
from tests.unit.gateway.planner.planned_fleet import Bounds
from tests.unit.gateway.prompts.tiny_model import TEMPLATE, make_model
from tests.unit.transport.replica_tables import StandingFleet
from transport.table.directory import TableDirectory

TOOL_TEMPLATE = TEMPLATE + "{% if tools %}{{ tools | tojson }}{% endif %}"


class Engine:
    """An engine's POST /tokenize, and with `answers` its chats, with a tokenizer of its own."""

    def __init__(self, model: Path, *, answers: bool = False, exclude_tools: bool = False) -> None:
        self.tokens = TokenService(TokenizerSource(str(model), exclude_tools=exclude_tools))
        self.tokens.load()
        self.answers = answers
        self.chat_status = 200
        self.chat_ids: Callable[[list[int]], list[int] | None] = lambda ids: ids
        self.chats: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.change: Callable[[dict[str, Any], list[int]], list[int]] = lambda request, ids: ids
        self.status = 200

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        if self.status != 200:
            return web.json_response({"error": {}}, status=self.status)
        try:
            ids = self.tokens.encode(body["prompt"]) if "prompt" in body else self.tokens.encode_chat(body)
        except NoTokenIds:
            return web.json_response({"error": {}}, status=400)
        return web.json_response({"tokens": self.change(body, ids.tolist()), "count": len(ids), "max_model_len": 77})

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.chats.append(body)
        if self.chat_status != 200:
            return web.json_response({"error": {}}, status=self.chat_status)
        ids = self.tokens.encode_chat({name: value for name, value in body.items() if name not in ("model", "cache_salt")})
        return web.json_response({"choices": [], "prompt_token_ids": self.chat_ids(ids.tolist())})


@asynccontextmanager
async def listening(engine: Engine, socket: Path) -> AsyncIterator[str]:
    app = web.Application()
    app.add_routes([web.post("/tokenize", engine.tokenize)])
    if engine.answers:
        app.add_routes([web.post("/v1/chat/completions", engine.chat)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(socket)).start()
    try:
        yield str(socket)
    finally:
        await runner.cleanup()


def ours(model: Path) -> TokenService:
    return TokenService(TokenizerSource(str(model)))


async def test_equal_tokenizers_are_exact(tmp_path: Path) -> None:
    engine = Engine(make_model(tmp_path / "m"))
    async with listening(engine, tmp_path / "s") as socket:
        verdict = await check_parity(ours(tmp_path / "m"), "replica-0", socket, "served")
    assert verdict.completions.parity is verdict.chat.parity is Parity.EXACT
    assert (verdict.completions.compared, verdict.chat.compared) == (len(COMPLETIONS), len(CHATS))
    assert (verdict.replica, verdict.context_tokens, verdict.differences) == ("replica-0", 77, 0)
    assert {request["model"] for request in engine.requests} == {"served"}


async def test_tools_are_compared_when_the_template_takes_them(tmp_path: Path) -> None:
    engine = Engine(make_model(tmp_path / "m", template=TOOL_TEMPLATE))
    async with listening(engine, tmp_path / "s") as socket:
        verdict = await check_parity(ours(tmp_path / "m"), "replica-0", socket, "served")
    assert verdict.chat.parity is Parity.EXACT
    assert sum("tools" in request for request in engine.requests) == len(TOOL_CHATS)


async def verdict_of(engine: Engine, tokens: TokenService, socket: Path) -> KindVerdict:
    async with listening(engine, socket) as path:
        return (await check_parity(tokens, "replica-0", path, "served")).chat


async def test_chats_are_compared_as_the_engine_answers_them(tmp_path: Path) -> None:
    engine = Engine(make_model(tmp_path / "m"), answers=True)
    verdict = await verdict_of(engine, ours(tmp_path / "m"), tmp_path / "s")
    assert (verdict.parity, verdict.compared) == (Parity.EXACT, len(CHATS) + len(ANSWERED_CHATS))
    for chat in engine.chats:
        assert (chat["max_tokens"], chat["return_token_ids"]) == (1, True)
        assert chat["cache_salt"]  # so that no client's prompt is answered from it


@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize("there", [False, True])
async def test_an_engine_that_leaves_tools_out_has_to_be_known_to_do_so(tmp_path: Path, here: bool, there: bool) -> None:
    model = make_model(tmp_path / "m", template=TOOL_TEMPLATE)
    tokens = TokenService(TokenizerSource(str(model), exclude_tools=here))
    verdict = await verdict_of(Engine(model, answers=True, exclude_tools=there), tokens, tmp_path / "s")
    if here == there:
        compared = len(CHATS) + len(TOOL_CHATS) + len(ANSWERED_CHATS) + len(ANSWERED_TOOL_CHATS)
        assert (verdict.parity, verdict.compared) == (Parity.EXACT, compared)
    else:
        assert verdict.parity is Parity.DEGRADED
        assert [found.split(":")[0] for found in verdict.differences] == ["tools not to be chosen"]


async def test_an_engine_that_answers_from_other_ids_than_it_tokenises_is_found_out(tmp_path: Path) -> None:
    engine = Engine(make_model(tmp_path / "m"), answers=True)
    engine.chat_ids = lambda ids: [*ids, 5]
    verdict = await verdict_of(engine, ours(tmp_path / "m"), tmp_path / "s")
    assert (verdict.parity, len(verdict.differences)) == (Parity.DEGRADED, len(ANSWERED_CHATS))


async def test_chats_that_the_engine_refuses_or_tells_no_ids_of_say_nothing(tmp_path: Path) -> None:
    engine = Engine(make_model(tmp_path / "m"), answers=True)
    for status, ids in ((400, None), (404, None), (200, None)):
        engine.chat_status, engine.chat_ids = status, lambda _, told=ids: told
        verdict = await verdict_of(engine, ours(tmp_path / "m"), tmp_path / f"s{status}")
        assert (verdict.parity, verdict.compared) == (Parity.EXACT, len(CHATS))


async def test_an_engine_that_can_not_answer_chats_now_fails_the_check(tmp_path: Path) -> None:
    engine = Engine(make_model(tmp_path / "m"), answers=True)
    engine.chat_status = 503
    with pytest.raises(ParityCheckFailed):
        await verdict_of(engine, ours(tmp_path / "m"), tmp_path / "s")


async def test_another_chat_template_in_the_engine_leaves_completions_exact(tmp_path: Path) -> None:
    engine = Engine(make_model(tmp_path / "theirs", template="!" + TEMPLATE))
    make_model(tmp_path / "ours")
    async with listening(engine, tmp_path / "s") as socket:
        verdict = await check_parity(ours(tmp_path / "ours"), "replica-0", socket, "served")
    assert (verdict.completions.parity, verdict.chat.parity) == (Parity.EXACT, Parity.OFF)
    assert verdict.chat.differences[0] == "one turn: token 0 is 0 here, 2 in the engine"


async def test_one_canary_that_differs_degrades_its_kind(tmp_path: Path) -> None:
    engine = Engine(make_model(tmp_path / "m"))
    engine.change = lambda request, ids: [*ids, 5] if request.get("prompt") == COMPLETIONS["emoji"] else ids
    async with listening(engine, tmp_path / "s") as socket:
        verdict = await check_parity(ours(tmp_path / "m"), "replica-0", socket, "served")
    assert verdict.completions.parity is Parity.DEGRADED
    assert [difference.split(":")[0] for difference in verdict.completions.differences] == ["emoji"]
    assert verdict.chat.parity is Parity.EXACT


async def test_a_template_that_refuses_a_canary_agrees_with_an_engine_that_does(tmp_path: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    engine = Engine(make_model(tmp_path / "m", template=strict))
    async with listening(engine, tmp_path / "s") as socket:
        verdict = await check_parity(ours(tmp_path / "m"), "replica-0", socket, "served")
    refused = sum(chat["messages"][0]["role"] == "system" for chat in CHATS.values())
    assert refused
    assert (verdict.chat.parity, verdict.chat.compared) == (Parity.EXACT, len(CHATS) - refused)


async def test_without_a_tokenizer_both_kinds_are_off_and_the_reason_is_kept(tmp_path: Path) -> None:
    engine = Engine(make_model(tmp_path / "m"))
    async with listening(engine, tmp_path / "s") as socket:
        verdict = await check_parity(ours(tmp_path / "nothing" / "here" / "at all"), "replica-0", socket, "served")
    assert verdict.completions.parity is verdict.chat.parity is Parity.OFF
    assert "not a directory" in verdict.completions.reason


@pytest.mark.parametrize("status", [404, 503])
async def test_an_engine_that_does_not_tokenise_fails_the_check(tmp_path: Path, status: int) -> None:
    engine = Engine(make_model(tmp_path / "m"))
    engine.status = status
    async with listening(engine, tmp_path / "s") as socket:
        with pytest.raises(ParityCheckFailed):
            await check_parity(ours(tmp_path / "m"), "replica-0", socket, "served")
    with pytest.raises(ParityCheckFailed):
        await check_parity(ours(tmp_path / "m"), "replica-0", str(tmp_path / "nobody"), "served")


def test_differences_are_told_by_place_length_and_refusal() -> None:
    ours_ = {"a": [1, 2], "b": [1, 2], "c": [1], "d": None, "e": [1], "f": None}
    theirs = {"a": [1, 3], "b": [1, 2, 3], "c": None, "d": [1], "e": [1], "f": None}
    verdict = compare(ours_, theirs)
    assert (verdict.parity, verdict.compared) == (Parity.DEGRADED, 5)
    assert verdict.differences == (
        "a: token 1 is 2 here, 3 in the engine",
        "b: 2 tokens here, 3 in the engine",
        "c: refused by the engine",
        "d: not tokenised here",
    )


def test_with_nothing_to_compare_parity_is_off() -> None:
    assert compare({}, {}).parity is compare({"a": None}, {"a": None}).parity is Parity.OFF


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for knows no event
            await asyncio.sleep(0.005)


async def test_the_watch_asks_once_and_again_when_that_replica_was_replaced(tmp_path: Path) -> None:
    engine = Engine(make_model(tmp_path / "m"))
    tokens = ours(tmp_path / "m")
    fleet = StandingFleet("a", "b")
    fleet.set("a", ReplicaState.STARTING)
    fleet.set("b", ReplicaState.STARTING)
    planner = Planner(fleet, TableDirectory(tmp_path), tokens, Bounds())
    watch = ParityWatch(fleet, planner.prompts, tokens, poll_seconds=0.001, retry_seconds=0.001)
    async with listening(engine, tmp_path / "s") as socket:
        task = asyncio.create_task(watch.run())
        try:
            assert planner.prompts.parity.completions.parity is Parity.UNKNOWN
            fleet.set("b", ReplicaState.READY, socket=socket)
            await until(lambda: planner.prompts.parity.replica == "b")
            fleet.set("b", ReplicaState.STARTING, pid=999)
            await until(lambda: planner.prompts.parity.completions.parity is Parity.UNKNOWN)
            fleet.set("a", ReplicaState.READY, socket=socket)
            await until(lambda: planner.prompts.parity.replica == "a")
        finally:
            task.cancel()
    assert planner.prompts.parity_counts == ParityCounts(checks=2, failures=0, differences_found=0)
    assert planner.prompts.parity.chat.parity is Parity.EXACT


async def test_the_watch_counts_failures_and_differences_and_tries_again(tmp_path: Path) -> None:
    engine = Engine(make_model(tmp_path / "m"))
    engine.status = 503
    engine.change = lambda request, ids: [*ids, 5] if request.get("prompt") == COMPLETIONS["emoji"] else ids
    tokens, fleet = ours(tmp_path / "m"), StandingFleet("a")
    planner = Planner(fleet, TableDirectory(tmp_path), tokens, Bounds())
    async with listening(engine, tmp_path / "s") as socket:
        fleet.set("a", ReplicaState.READY, socket=socket)
        task = asyncio.create_task(ParityWatch(fleet, planner.prompts, tokens, poll_seconds=0.001, retry_seconds=0.001).run())
        try:
            await until(lambda: planner.prompts.parity_counts.failures > 1)
            engine.status = 200
            await until(lambda: planner.prompts.parity.completions.parity is Parity.DEGRADED)
        finally:
            task.cancel()
    counts = planner.prompts.parity_counts
    assert (counts.checks, counts.differences_found) == (counts.failures + 1, 1)


async def test_verdicts_are_renewed_by_turns_and_a_change_is_told_counted_and_takes_effect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, other = Engine(make_model(tmp_path / "m")), Engine(make_model(tmp_path / "m"))
    tokens, fleet = ours(tmp_path / "m"), StandingFleet("a", "b")
    planner, now = Planner(fleet, TableDirectory(tmp_path), tokens, Bounds()), 0.0
    watch = ParityWatch(
        fleet, planner.prompts, tokens, interval_seconds=300, poll_seconds=0.001, retry_seconds=0.001, clock=lambda: now
    )

    def later() -> bool:
        nonlocal now
        now += 301.0
        return planner.prompts.parity_counts.changes == 2

    async with listening(engine, tmp_path / "s") as socket, listening(other, tmp_path / "t") as second:
        fleet.set("a", ReplicaState.READY, socket=socket)
        fleet.set("b", ReplicaState.READY, socket=second)
        task = asyncio.create_task(watch.run())
        try:
            await until(lambda: planner.prompts.parity.replica == "a")
            other.change = lambda request, ids: [*ids, 5] if request.get("prompt") == COMPLETIONS["emoji"] else ids
            assert planner.prompts.parity_counts.checks == 1
            now = 301.0
            await until(lambda: planner.prompts.parity.completions.parity is Parity.DEGRADED)
            assert (planner.prompts.parity.replica, planner.prompts.parity_counts.changes) == ("b", 1)
            assert "were exact, are degraded by b: 1 of" in caplog.text
            engine.status = 503
            now = 602.0
            await until(lambda: planner.prompts.parity_counts.failures > 0)
            assert planner.prompts.parity.completions.parity is Parity.DEGRADED
            engine.status = 200
            await until(later)
            assert planner.prompts.parity.replica == "a"
            assert planner.prompts.parity.completions.parity is Parity.EXACT
        finally:
            task.cancel()


async def test_without_an_interval_a_verdict_is_not_renewed(tmp_path: Path) -> None:
    engine = Engine(make_model(tmp_path / "m"))
    tokens, fleet = ours(tmp_path / "m"), StandingFleet("a")
    planner, looks = Planner(fleet, TableDirectory(tmp_path), tokens, Bounds()), 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return 1e9 * looks

    async with listening(engine, tmp_path / "s") as socket:
        fleet.set("a", ReplicaState.READY, socket=socket)
        watch = ParityWatch(fleet, planner.prompts, tokens, poll_seconds=0.001, clock=clock)
        task = asyncio.create_task(watch.run())
        polls = []
        snapshot = fleet.snapshot
        fleet.snapshot = lambda: polls.append(1) or snapshot()  # type: ignore[method-assign]
        try:
            await until(lambda: planner.prompts.parity.replica == "a")
            seen = len(polls)
            await until(lambda: len(polls) > seen + 5)
        finally:
            task.cancel()
    assert planner.prompts.parity_counts.checks == 1
