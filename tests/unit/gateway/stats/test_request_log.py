"""The lines of the request log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.api.usage import Usage
from gateway.relay.request_record import RequestRecord
from gateway.stats.log_file import LogFile
from gateway.stats.request_log import RequestLog, request_line
from tests.unit.gateway.ledger.begun_attempts import begun
from tests.unit.gateway.relay.relay_client import COMPLETION, KEYS
from tests.unit.gateway.running_door import running_door
from transport.table.deliveries import Delivery, FromSource

SECRETS = ("the prompt", "w0", "w1", KEYS[0]["api_key"], "pepper")


def delivered(**fields: Any) -> Delivery:
    """A record of an engine that had the request at 50 s, began at 50.5 s and had the first token at 51 s."""
    seconds = 1_000_000_000
    times = {"arrived_ns": 50 * seconds, "scheduled_ns": 50 * seconds + seconds // 2, "first_token_ns": 51 * seconds}
    return Delivery(**(times | fields))


def record_of(*deliveries: Delivery, **fields: Any) -> RequestRecord:
    """The record of a request that came at 49 s and was over at 53 s."""
    attempt = begun(1, replica="replica-1")
    for delivery in deliveries:
        attempt.add(delivery)
    common = {"request_id": "r", "tenant": "t", "status": 200, "attempt": attempt, "attempts": 1}
    return RequestRecord("chat", **(common | {"seconds": 4.0, "ended_at": 53.0, "first_byte_seconds": 3.5} | fields))


def test_a_line_says_where_the_prompts_tokens_came_from() -> None:
    delivery = delivered(prompt_tokens=100, local_tokens=30, peer_tokens=50, computed_tokens=20, source="replica-0")
    line = request_line(record_of(delivery, usage=Usage(100, 7)), 0.0)
    assert (line.prompt_tokens, line.cached_tokens, line.completion_tokens, line.estimated) == (100, 80, 7, False)
    assert (line.local_tokens, line.peer_tokens, line.host_memory_tokens, line.computed_tokens) == (30, 50, 0, 20)
    assert (line.replica, line.source) == ("replica-1", "replica-0")


def test_tokens_out_of_a_tier_are_host_memorys() -> None:
    delivery = delivered(prompt_tokens=100, peer_tokens=50, computed_tokens=50, source="replica-0.host-memory")
    line = request_line(record_of(delivery), 0.0)
    assert (line.peer_tokens, line.host_memory_tokens, line.cached_tokens) == (0, 50, 50)
    assert (line.prompt_tokens, line.source) == (100, "replica-0.host-memory")


def test_tokens_of_a_mixed_import_are_counted_by_their_sources() -> None:
    mix = {"source": "disk", "further": (FromSource("replica-0", 20), FromSource("replica-0.host-memory", 16))}
    line = request_line(
        record_of(delivered(prompt_tokens=100, local_tokens=10, peer_tokens=80, computed_tokens=10, **mix)), 0.0
    )
    assert (line.local_tokens, line.peer_tokens, line.host_memory_tokens, line.disk_tokens) == (10, 20, 16, 44)
    assert (line.vault_tokens, line.computed_tokens, line.cached_tokens, line.source) == (0, 10, 90, "disk")


def test_a_whole_answers_first_token_is_the_engines_and_a_streams_is_its_first_event() -> None:
    whole, streamed = (request_line(record_of(delivered(), streamed=streamed), 0.0) for streamed in (False, True))
    assert (whole.queue_seconds, whole.first_token_seconds, whole.seconds) == (0.5, 2.0, 4.0)
    assert (streamed.queue_seconds, streamed.first_token_seconds, streamed.seconds) == (0.5, 3.5, 4.0)


def test_what_is_not_known_is_null() -> None:
    refused = request_line(
        RequestRecord("chat", request_id="r", status=401, error="invalid_api_key", first_byte_seconds=0.1), 0.0
    )
    assert (refused.tenant, refused.model, refused.replica, refused.prompt_tokens, refused.error) == (
        *(None, None, None, None),
        "invalid_api_key",
    )
    unrecorded = request_line(record_of(streamed=True, status=400), 0.0)
    assert (unrecorded.cached_tokens, unrecorded.queue_seconds, unrecorded.first_token_seconds) == (None, None, None)


def test_tokens_counted_by_events_are_said_to_be_estimated() -> None:
    line = request_line(record_of(streamed=True, events=5), 0.0)
    assert (line.completion_tokens, line.estimated) == (5, True)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_leaves_one_line_without_prompt_answer_and_keys(tmp_path: Path, stream: bool) -> None:
    file = LogFile(str(tmp_path / "log"))
    log = RequestLog(file, lambda: 1_800_000_000.0)
    async with running_door(tmp_path, meters=[log], tenants=KEYS) as door:
        await door.add_engine("replica-0")
        body = COMPLETION | {"prompt": "the prompt", "stream": stream}
        key = {"authorization": f"Bearer {KEYS[0]['api_key']}", "x-request-id": "mine"}
        async with door.session.post(door.url + "/v1/completions", json=body, headers=key) as answer:
            assert answer.status == 200
            await answer.read()
        door.relay.records.flush()
    await file.close()
    (text,) = (tmp_path / "log").read_text().splitlines()
    assert not [secret for secret in SECRETS if secret in text]
    line = json.loads(text)
    assert (line["id"], line["tenant"], line["endpoint"], line["model"]) == ("mine", "a", "completions", "fake-model")
    assert (line["replica"], line["status"], line["stream"], line["completion_tokens"]) == ("replica-0", 200, stream, 3)
    assert line["time"].startswith("2027-01-15T07:59:5")
    assert {metric.name: metric.samples[0].value for metric in log.collect()} == {
        "peerkv_request_log_lines": 1,
        "peerkv_request_log_dropped_lines": 0,
    }
