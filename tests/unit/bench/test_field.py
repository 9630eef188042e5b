"""The parts of bench.field that can be wrong without anybody noticing: workloads, counters, answers, policies, ratios."""

import asyncio
import json
import random
import socket
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from bench.engines import Counts, parse_counts
from bench.field.arms import CPU_ARMS, PEERKV, PEERKV_ALONE, ROUND_ROBIN
from bench.field.flags import CPU_SIZE, NUMBERED, parse, write_chat_model
from bench.field.report import WINDOW, about, as_json, figures_of, from_json, markdown, seconds_until_back, where_and_when
from bench.machine import held_port
from bench.open_loop import Player, Sample
from bench.policy_relay import place
from bench.simulate.workloads import TURNS
from bench.workloads import WORKLOADS, Talk, Turn, Workload, conversations, hot, shared
from gateway.cli.bench.words import COMMON, Words
from gateway.prompts.tokenizer.engine_options import source_from_arguments
from gateway.prompts.tokenizer.service import TokenService

SIZE = replace(CPU_SIZE, seconds=200.0)
METRICS = """
# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"} 1200.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_cache_hit"} 64.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="external_kv_transfer"} 32.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 1296.0
vllm:generation_tokens_total{engine="0",model_name="m"} 7.0
vllm:num_preemptions_total{engine="0",model_name="m"} 1.0
"""


def talks(workload: Workload, seed: int, words_seed: int, vocabulary: tuple[str, ...] = COMMON) -> list[Talk]:
    return workload.talks(SIZE, random.Random(seed), Words(random.Random(words_seed), vocabulary))


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda each: each.name)
def test_arms_of_a_round_get_the_same_shape_in_other_words(workload: Workload) -> None:
    one, other = talks(workload, 1, 1), talks(workload, 1, 2)
    assert [talk.at for talk in one] == [talk.at for talk in other]
    shape = [[(turn.pause, len(turn.text.split()), turn.answer_tokens) for turn in talk.turns] for talk in one]
    assert shape == [[(turn.pause, len(turn.text.split()), turn.answer_tokens) for turn in talk.turns] for talk in other]
    heads = [{" ".join(turn.text.split()[:32]) for talk in made for turn in talk.turns} for made in (one, other)]
    assert not heads[0] & heads[1]
    assert [talk.at for talk in talks(workload, 2, 1)] != [talk.at for talk in one]


def test_shared_prefixes_are_more_than_one_replica_holds_and_less_than_two() -> None:
    made = shared(SIZE, random.Random(1), Words(random.Random(1)))
    prefixes = {" ".join(talk.turns[0].text.split()[: SIZE.prefix_tokens]) for talk in made}
    assert SIZE.cache_tokens < len(prefixes) * SIZE.prefix_tokens < 2 * SIZE.cache_tokens
    assert len(made) > 3 * len(prefixes)


def test_a_hot_prefix_begins_most_requests() -> None:
    made = hot(SIZE, random.Random(1), Words(random.Random(1)))
    heads = [" ".join(talk.turns[0].text.split()[:100]) for talk in made]
    assert 0.5 < heads.count(max(set(heads), key=heads.count)) / len(heads) < 0.7


def test_conversations_have_their_turns_at_the_rate() -> None:
    made = conversations(SIZE, random.Random(1), Words(random.Random(1)))
    assert all(len(talk.turns) == TURNS and talk.chat for talk in made)
    assert 0.6 < sum(len(talk.turns) for talk in made) / SIZE.seconds / SIZE.rate < 1.5


@pytest.mark.parametrize("workload", [each for each in WORKLOADS if each.warm is not None], ids=lambda each: each.name)
def test_where_the_fleet_changes_the_prefixes_are_those_that_it_was_filled_with(workload: Workload) -> None:
    def prefixes(made: list[Talk]) -> list[str]:
        return [" ".join(talk.turns[0].text.split()[: SIZE.prefix_tokens]) for talk in made]

    assert workload.warm is not None
    known = prefixes(workload.warm(SIZE, Words(random.Random(7))))
    assert len(set(known)) == len(known)
    assert len(known) * SIZE.prefix_tokens < SIZE.cache_tokens
    assert set(prefixes(talks(workload, 1, 7))) == set(known)


def test_the_time_until_the_p90_is_back_is_that_of_the_last_slow_window() -> None:
    def run(seconds_of: "list[float]") -> float:
        return seconds_until_back([Sample(0.5 * place, first, first, 1, 1) for place, first in enumerate(seconds_of)])

    steady = [0.1] * 30
    assert run(steady) == 0.0
    slow_until = 20
    back = run([0.9] * slow_until + steady)
    assert 0.5 * slow_until <= back < 0.5 * (slow_until + WINDOW)
    assert run([0.14] * 60) == 0.0  # slow throughout is what it is like, not a change


def test_the_numbered_vocabulary_is_known_to_the_dummy_model() -> None:
    made = talks(WORKLOADS[0], 1, 1, NUMBERED)
    assert all(word[0] == "w" and 20 <= int(word[1:]) < 128_000 for word in made[0].turns[0].text.split())


def test_the_dummy_models_words_are_the_same_tokens_for_the_gateway_and_for_everybody(tmp_path: Path) -> None:
    tokens = TokenService(source_from_arguments(str(write_chat_model(tmp_path)), ()))
    tokens.load()
    assert list(tokens.encode("w20 w2000 w127999")) == [20, 2000, 127999]
    assert not any(f"w{number}" in tokens_of(tmp_path) for number in range(10))
    assert list(tokens.encode_chat({"messages": [{"role": "user", "content": "w25"}]})) == [10, 25, 11, 12]


def tokens_of(model: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    return found


def test_counts_are_read_from_the_engines_own_metrics() -> None:
    found = parse_counts(METRICS)
    assert found == Counts(computed=1200, local=64, peer=32, generated=7, preemptions=1)
    assert (found + found).since(found) == found


def test_a_source_that_is_not_known_is_not_passed_over() -> None:
    with pytest.raises(KeyError):
        parse_counts(METRICS.replace("local_compute", "elsewhere"))


def test_a_held_port_can_be_served_and_is_nobody_elses() -> None:
    with closing(held_port()) as held, closing(socket.socket()) as other, closing(socket.socket()) as door:
        with pytest.raises(OSError, match="in use"):
            other.bind(held.getsockname())
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(held.getsockname())
        door.listen()
        with closing(socket.create_connection(held.getsockname())) as client:
            assert door.accept()[1] == client.getsockname()


def test_sticky_keeps_a_prefix_together_and_round_robin_does_not() -> None:
    def body(text: str) -> bytes:
        return json.dumps({"model": "m", "prompt": text, "stream": True}).encode()

    beginning = "x" * 600
    assert len({place("sticky", body(beginning + str(n)), n, 2) for n in range(20)}) == 1
    assert {place("sticky", body(f"{n}{beginning}"), n, 2) for n in range(20)} == {0, 1}
    assert [place("round_robin", body(beginning), n, 2) for n in range(4)] == [0, 1, 0, 1]
    chat = json.dumps({"messages": [{"role": "user", "content": beginning}]}).encode()
    assert place("sticky", chat, 0, 2) == place("sticky", chat, 1, 2)


class Upstream:
    """An engine that keeps what it was sent and answers `events`."""

    def __init__(self, *events: str) -> None:
        self.events, self.bodies = events, list[dict[str, object]]()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        response = web.StreamResponse()
        await response.prepare(request)
        for event in self.events:
            await response.write(f"data: {event}\n\n".encode())
        return response


async def played(upstream: Upstream, *made: Talk, extra: dict[str, object] | None = None) -> Player:
    app = web.Application()
    app.add_routes([web.post("/v1/completions", upstream.answer), web.post("/v1/chat/completions", upstream.answer)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        player = Player(f"http://127.0.0.1:{runner.addresses[0][1]}", "m", extra or {})
        await asyncio.wait_for(player.play(made), 15)
        return player
    finally:
        await runner.cleanup()


USAGE = '{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}'


async def test_a_conversation_carries_what_was_said_and_other_arms_a_hint_to_import_nothing() -> None:
    upstream = Upstream('{"choices": [{"delta": {"role": "assistant", "content": "well"}}]}', USAGE, "[DONE]")
    talk = Talk(0.0, (Turn(0.0, "one", 2), Turn(0.0, "two", 2)), chat=True)
    player = await played(upstream, talk, extra=dict(ROUND_ROBIN.extra_fields()))
    assert [sample.error for sample in player.samples] == ["", ""]
    said = upstream.bodies[1]["messages"]
    assert said == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "well"},
        {"role": "user", "content": "two"},
    ]
    assert upstream.bodies[0]["kv_transfer_params"] == {"peerkv": {"source": ""}}
    assert not PEERKV.extra_fields()
    assert not PEERKV_ALONE.extra_fields()


@pytest.mark.parametrize(
    ("events", "error"),
    [
        (('{"choices": [{"text": "w"}]}', USAGE), "ended early"),
        (('{"error": {"message": "no"}}', "[DONE]"), "no"),
        (('{"choices": [{"text": "w"}]}', USAGE.replace("2", "1"), "[DONE]"), "1 tokens came of 2"),
    ],
)
async def test_an_answer_that_is_not_whole_is_an_error(events: tuple[str, ...], error: str) -> None:
    player = await played(Upstream(*events), Talk(0.0, (Turn(0.0, "one", 2),)))
    assert len(player.samples) == 1
    assert error in player.samples[0].error


def test_ratios_are_taken_within_a_round() -> None:
    def runs(arm: str, *seconds: float) -> list:
        return [
            figures_of(arm, "shared", turn, [Sample(0.0, value, value, 4, 100)], 10.0, Counts(computed=100))
            for turn, value in enumerate(seconds)
        ]

    said = {"date": "d", "processor": "p", "gpus": "", "versions": "v", "command": "c"}
    table = markdown([*runs("peerkv", 1.0, 10.0), *runs("other", 2.0, 30.0)], "peerkv", said)
    row = next(line for line in table.splitlines() if line.startswith("| other"))
    assert row.split("|")[2].strip() == "2.5 (2 to 3)"


def test_what_was_written_as_json_is_read_again() -> None:
    samples = [Sample(0.0, 0.5, 1.0, 8, 100), Sample(0.1, 0.7, 1.2, 8, 100)]
    runs = [
        replace(figures_of(arm, "hot", turn, samples, 2.0, Counts(computed=120 + turn, local=80)), ledger={"settled": 2})
        for turn in range(2)
        for arm in ("peerkv", "relay sticky")
    ]
    written = json.loads(json.dumps(as_json(runs, ["a failure"], {"date": "today"})))
    assert from_json(written) == (runs, {"date": "today"})


def test_arms_and_workloads_can_be_chosen() -> None:
    given = parse(["--model", "m", "--arms", "peerkv, relay sticky", "--workloads", "hot", "--rate", "3"])
    assert [arm.name for arm in given.arms] == ["peerkv", "relay sticky"]
    assert [each.name for each in given.workloads] == ["hot"]
    assert (given.size.rate, given.size.prefix_tokens) == (3.0, CPU_SIZE.prefix_tokens)
    assert parse(["--model", "m"]).arms == list(CPU_ARMS)
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--arms", "peerkv,no such"])


def test_the_command_that_is_told_can_be_given_to_a_shell_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--arms", "shared pool; private pools"])
    assert where_and_when("bench.pools", gpus=False)["command"] == "python -m bench.pools --arms 'shared pool; private pools'"


def test_what_ran_is_told_with_the_pinned_versions_of_the_routers_that_took_part() -> None:
    given = parse(["--model", "m"])
    versions = about(given)["versions"]
    routers = {arm.name.split()[0] for arm in given.arms if arm.rust}
    assert routers
    assert all(f"{name} " in versions for name in routers)
