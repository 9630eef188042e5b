"""What the relay tells its witness of each attempt, over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from gateway.ledger.attempts import Asked, Entry
from gateway.ledger.ledger import LEFT_STATUS, LOST_STATUS
from tests.unit.gateway.ledger.planned_attempts import planned
from tests.unit.gateway.running_door import Door, FakePlan, running_door, until

COMPLETION = {"model": "fake-model", "prompt": "hello", "max_tokens": 3}
SENT_ON_HEADERS = b"local=1, peer=2, computed=3, reason=cold"


class FakeWitness:
    """Writes down what it is told; `events` has the replica's name, and the status of ended attempts."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.events: list[tuple[Any, ...]] = []
        self.header = SENT_ON_HEADERS

    def sent(self, plan: FakePlan, asked: Asked) -> Entry:
        self.asked.append(asked)
        name = plan.replica.name
        self.events.append(("sent", name))
        tag = len(self.asked)
        return Entry(planned(tag, request_id=asked.request_id, replica=name), 0.0)

    def first_byte(self, entry: Entry) -> bytes:
        self.events.append(("first byte", entry.planned.replica))
        return self.header

    def ended(self, entry: Entry, status: int) -> None:
        self.events.append(("ended", entry.planned.replica, status))


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        yield door


@pytest.fixture
def witness(door: Door) -> FakeWitness:
    door.relay.witness = witness = FakeWitness()
    return witness


async def test_a_whole_answer_carries_the_header_and_is_told_once(door: Door, witness: FakeWitness) -> None:
    status, _, headers = await door.post("/v1/completions", COMPLETION, headers={"x-request-id": "me-1"})
    assert (status, headers["x-peerkv-cache"]) == (200, SENT_ON_HEADERS.decode())
    assert witness.events == [("sent", "replica-0"), ("first byte", "replica-0"), ("ended", "replica-0", 200)]
    assert witness.asked == [Asked("me-1", "completions", "anonymous", "fake-model")]


async def test_a_stream_carries_the_header_too(door: Door, witness: FakeWitness) -> None:
    async with door.session.post(door.url + "/v1/completions", json=COMPLETION | {"stream": True}) as answer:
        assert answer.headers["x-peerkv-cache"] == SENT_ON_HEADERS.decode()
        await answer.read()
    await until(lambda: len(witness.events) == 3)
    assert witness.events == [("sent", "replica-0"), ("first byte", "replica-0"), ("ended", "replica-0", 200)]


async def test_a_defect_of_the_witness_leaves_nothing_in_flight(door: Door, witness: FakeWitness) -> None:
    witness.sent = Mock(side_effect=RuntimeError("a defect"))  # type: ignore[method-assign]
    status, _, _ = await door.post("/v1/completions", COMPLETION)
    assert status == 500
    assert door.planner.in_flight == {"replica-0": 0}


async def test_nothing_known_means_no_header(door: Door, witness: FakeWitness) -> None:
    witness.header = b""
    _, _, headers = await door.post("/v1/completions", COMPLETION)
    assert "x-peerkv-cache" not in headers


async def test_a_replica_that_dies_makes_two_attempts_under_one_id(door: Door, witness: FakeWitness) -> None:
    await door.add_engine("replica-1")
    fake = {"drop": "before", "on": "replica-0"}
    status, _, headers = await door.post("/v1/completions", COMPLETION | {"fake": fake})
    assert (status, headers["x-peerkv-replica"]) == (200, "replica-1")
    assert witness.events[:3] == [("sent", "replica-0"), ("ended", "replica-0", LOST_STATUS), ("sent", "replica-1")]
    assert witness.events[-1] == ("ended", "replica-1", 200)
    assert len({asked.request_id for asked in witness.asked}) == 1


async def test_a_request_that_no_replica_serves_says_so_without_the_header(door: Door, witness: FakeWitness) -> None:
    status, _, headers = await door.post("/v1/completions", COMPLETION | {"fake": {"drop": "before"}})
    assert status == 502
    assert "x-peerkv-cache" not in headers
    assert witness.events == [("sent", "replica-0"), ("ended", "replica-0", LOST_STATUS)]


async def test_a_refusal_of_the_engine_has_its_status(door: Door, witness: FakeWitness) -> None:
    await door.post("/v1/completions", COMPLETION | {"fake": {"status": 422}})
    assert witness.events[-1] == ("ended", "replica-0", 422)


async def test_a_client_that_leaves_ends_its_attempt(door: Door, witness: FakeWitness) -> None:
    body = COMPLETION | {"stream": True, "max_tokens": 1000, "fake": {"token_delay": 0.05}}
    async with door.session.post(door.url + "/v1/completions", json=body) as answer:
        await answer.content.readany()
    await until(lambda: len(witness.events) == 3)
    assert witness.events[-1] == ("ended", "replica-0", LEFT_STATUS)
