"""A fleet whose vLLM servers were given options that change what is rendered and streamed: as vLLM alone would do it."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.real.conftest import running
from tests.real.fleet import ANSWER_SECONDS_MAX, Fleet
from tests.real.prompts import Words

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEEP_ALIVE_SECONDS = 1
VLLM_ARGS = (
    *("--dtype", "float32", "--chat-template", TEMPLATE),
    *("--exclude-tools-when-tool-choice-none", "--sse-keep-alive-interval", str(KEEP_ALIVE_SECONDS)),
)
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tell the weather of a place, now or later."}}
CHAT = {"messages": [{"role": "user", "content": "How is the weather?"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def optioned() -> Iterator[Fleet]:
    with running(Fleet(vllm_args=VLLM_ARGS)) as fleet:
        yield fleet


def both(fleet: Fleet, body: dict[str, Any]) -> tuple[httpx.Response, httpx.Response]:
    """The answers of the gateway and of a replica's own socket to a chat."""
    transport = httpx.HTTPTransport(uds=str(fleet.run_dir / "replica-0.sock"))
    with httpx.Client(transport=transport, base_url="http://replica", timeout=ANSWER_SECONDS_MAX) as replica:
        asked = {"content": json.dumps(body), "headers": {"content-type": "application/json"}}
        alone = replica.post("/v1/chat/completions", **asked)
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
    with optioned.client.stream("POST", "/v1/completions", json=body) as answer:
        waited = time.monotonic() - began
        assert "computed=" in answer.headers["x-peerkv-cache"]
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [line for line in lines if not line.startswith(":")]
    assert len(events) < len(lines) or waited < 2 * KEEP_ALIVE_SECONDS
    assert json.loads(events[0].removeprefix("data: "))["choices"]
