"""A fleet whose vLLM servers were given options: what they render, stream and keep, whom they serve first, what they trace."""

import json
import secrets
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gateway.tenants.key_file import write_keys
from gateway.tenants.keys import CLASSES, Key, digest_of, new_token, no_keys
from tests.real.collector import ENVIRONMENT, Collector
from tests.real.conftest import running
from tests.real.fleet import ANSWER_SECONDS_MAX, REPLICAS, Fleet, until
from tests.real.prompts import Words

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEEP_ALIVE_SECONDS = 1
VLLM_ARGS = (
    *("--dtype", "float32", "--chat-template", TEMPLATE),
    *("--exclude-tools-when-tool-choice-none", "--sse-keep-alive-interval", str(KEEP_ALIVE_SECONDS)),
    *("--scheduling-policy", "priority", "--max-num-seqs", "1"),
)
KEEPING = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
KEYS = {name: new_token() for name in CLASSES}
"""The key of each class is of a tenant of its own, which is called the same."""
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tell the weather of a place, now or later."}}
CHAT = {"messages": [{"role": "user", "content": "How is the weather?"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def optioned(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    keys, path = no_keys(), tmp_path_factory.mktemp("keys") / "keys.toml"
    for name, token in KEYS.items():
        keys = keys.with_key(Key(name=name, tenant=name, sha256=digest_of(token.encode()).hex(), priority=name))
    write_keys(path, keys)
    config = f'keys_file = "{path}"\notlp_traces_endpoint = "{collector.endpoint}"\n'
    arguments = (*VLLM_ARGS, "--otlp-traces-endpoint", collector.endpoint)
    with running(Fleet(config, (), arguments, KEYS["normal"], KEEPING | ENVIRONMENT)) as fleet:
        yield fleet


def both(fleet: Fleet, body: dict[str, Any]) -> tuple[httpx.Response, httpx.Response]:
    """The answers of the gateway and of a replica's own socket to a chat."""
    transport = httpx.HTTPTransport(uds=str(fleet.run_dir / "replica-0.sock"))
    with httpx.Client(transport=transport, base_url="http://replica", timeout=ANSWER_SECONDS_MAX) as replica:
        asked = {"content": json.dumps(body), "headers": {"content-type": "application/json"}}
        alone = replica.post("/v1/chat/completions", **asked)
    asked["headers"] |= fleet.headers()
    return fleet.client.post("/v1/chat/completions", **asked), alone


def test_tools_that_may_not_be_chosen_are_left_out_of_the_prompt_as_vllm_does(optioned: Fleet) -> None:
    assert optioned.stats()["parity"]["chat"]["parity"] == "exact"
    used = {}
    for choice in ("none", None):
        ours, theirs = both(optioned, CHAT | {"tools": [TOOL], "tool_choice": choice})
        assert (ours.status_code, theirs.status_code) == (200, 200)
        used[choice] = ours.json()["usage"]["prompt_tokens"]
        assert used[choice] == theirs.json()["usage"]["prompt_tokens"]
    assert used["none"] < used[None]


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "nothing", "text": "x"}]}]},
        {"messages": []},
        {"max_tokens": 0},
        {"priority": 0},
        {"user": "\ud83d"},
        {"reasoning_effort": "much"},
        {"n": 0},
    ],
    ids=str,
)
def test_vllm_alone_decides_what_is_right(optioned: Fleet, change: dict[str, Any]) -> None:
    ours, theirs = both(optioned, CHAT | change)
    assert ours.status_code == theirs.status_code, (ours.text, theirs.text)
    if ours.status_code == 400:
        error = ours.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["code"] is None
        assert error["message"] == theirs.json()["error"]["message"]


def test_comments_of_a_long_wait_cost_no_header(optioned: Fleet) -> None:
    body = {"prompt": Words(optioned.model_dir).text(600), "max_tokens": 1, "stream": True, "temperature": 0}
    began = time.monotonic()
    with optioned.client.stream("POST", "/v1/completions", json=body, headers=optioned.headers()) as answer:
        waited = time.monotonic() - began
        assert "computed=" in answer.headers["x-peerkv-cache"]
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [line for line in lines if not line.startswith(":")]
    assert len(events) < len(lines) or waited < 2 * KEEP_ALIVE_SECONDS
    assert json.loads(events[0].removeprefix("data: "))["choices"]


def respond(fleet: Fleet, input: Any, *, key: str = "normal", replica: str | None = None, **more: Any) -> httpx.Response:
    """The answer to a request for a response, of the replica if one is named."""
    body = {"model": fleet.model, "input": input, "max_output_tokens": 12, "temperature": 0, **more}
    headers = fleet.headers(KEYS[key]) | ({"x-peerkv-replica": replica} if replica else {})
    return fleet.client.post("/v1/responses", json=body, headers=headers)


def said(response: httpx.Response) -> str:
    (message,) = response.raise_for_status().json()["output"]
    (part,) = message["content"]
    text: str = part["text"]
    return text


@pytest.mark.parametrize("replica", REPLICAS)
def test_a_follow_up_goes_to_the_replica_that_keeps_the_response_and_is_the_conversations_next_turn(
    optioned: Fleet, replica: str
) -> None:
    turns = [{"role": "user", "content": "Name a city of France."}]
    last = respond(optioned, turns, replica=replica)
    for question in ("Is it large?", "Who lives there?"):
        turns += [{"role": "assistant", "content": said(last)}, {"role": "user", "content": question}]
        former = last.json()["id"]
        last = respond(optioned, question, previous_response_id=former)
        assert last.headers["x-peerkv-replica"] == replica
        whole = respond(optioned, turns, replica=replica)
        assert (said(last), last.json()["usage"]["input_tokens"]) == (said(whole), whole.json()["usage"]["input_tokens"])
        assert last.json()["usage"]["input_tokens"] > respond(optioned, question).json()["usage"]["input_tokens"]


def test_a_kept_response_is_nobody_elses_and_not_on_another_replica(optioned: Fleet) -> None:
    kept = respond(optioned, "Hello.", replica=REPLICAS[0]).json()["id"]
    for how in ({"key": "high"}, {"replica": REPLICAS[1]}):
        refused = respond(optioned, "And?", previous_response_id=kept, **how)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "previous_response_not_found")
    assert respond(optioned, "And?", previous_response_id=kept).status_code == 200


def test_a_key_of_a_higher_class_is_served_before_one_that_waited_longer(optioned: Fleet) -> None:
    """Each replica serves one request at a time, and one that is endless comes first."""
    words, replica = Words(optioned.model_dir), REPLICAS[0]
    served: list[str] = []

    def ask(name: str) -> None:
        optioned.answer(words.text(20), replica=replica, key=KEYS[name])
        served.append(name)

    def waiting(count: int) -> bool:
        return bool(optioned.replica_stats(replica)["load"]["waiting_requests"] == count)

    asking = [threading.Thread(target=ask, args=(name,)) for name in reversed(CLASSES)]
    with optioned.decoding([words.text(20)], replica):
        for count, thread in enumerate(asking, 1):
            thread.start()
            until(lambda count=count: waiting(count), ANSWER_SECONDS_MAX, f"{count} requests wait in the engine")
        assert served == []
    for thread in asking:
        thread.join(ANSWER_SECONDS_MAX)
    assert served == list(CLASSES)


@pytest.mark.parametrize("stream", [False, True])
def test_the_engines_span_is_the_child_of_the_gateways_in_the_clients_trace(
    optioned: Fleet, collector: Collector, stream: bool
) -> None:
    trace, client = secrets.token_hex(16), secrets.token_hex(8)
    headers = optioned.headers() | {"traceparent": f"00-{trace}-{client}-01"}
    body = optioned.body("Where is the river?", stream=stream)
    optioned.client.post("/v1/completions", json=body, headers=headers).raise_for_status()
    until(lambda: collector.named("peerkv", trace) != [], ANSWER_SECONDS_MAX, "the gateway's span has come")
    until(lambda: collector.named("llm_request", trace) != [], ANSWER_SECONDS_MAX, "the engine's span has come")
    (ours,), (theirs,) = collector.named("peerkv", trace), collector.named("llm_request", trace)
    assert ours.parent_span_id.hex() == client
    assert theirs.parent_span_id == ours.span_id
    assert ours.start_time_unix_nano <= theirs.start_time_unix_nano < theirs.end_time_unix_nano
