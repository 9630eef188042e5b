"""Requests that wait for room at the replicas: tenants in equal shares, deadlines, and clients that do not wait."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import InvalidRequest
from gateway.relay.admission import Admission, QueueFull
from gateway.relay.patience import timeout_of
from gateway.tenants.keys import NORMAL
from tests.unit.gateway.limits.limited_keys import limited
from tests.unit.gateway.relay.relay_client import COMPLETION
from tests.unit.gateway.relay.test_limits import headers, limited_door
from tests.unit.gateway.running_door import Door, running_door, until


class Room:
    """The settings of a queue."""

    replica_requests_max = 1
    queue_requests_max = 2
    queue_seconds_max = 60.0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def waits(admission: Admission, count: int) -> None:
    await until(lambda: admission.shown().waiting_requests == count)


async def post(door: Door, token: str, *, delay: float = 0.0, **sent: Any) -> int:
    body = COMPLETION | {"fake": {"delay": delay}}
    options = {"headers": headers(token) | sent, "json": body}
    async with door.session.post(door.url + "/v1/completions", **options) as answer:
        await answer.read()
        return answer.status


async def occupied(door: Door, count: int) -> Admission:
    """The queue of a door whose room is taken until `leave` is called so often."""
    admission = door.fleets.first.admission
    assert admission is not None
    for _ in range(count):
        await admission.enter("somebody", NORMAL, 1)
    return admission


async def test_a_flood_of_one_tenant_lets_another_go_next(tmp_path: Path) -> None:
    keys = [limited("flood", tenant="flood"), limited("quiet", tenant="quiet")]
    async with limited_door(tmp_path, *keys, replica_requests_max=2) as door:
        admission = await occupied(door, 2)
        order: list[str] = []

        async def one(name: str) -> None:
            assert await post(door, name) == 200
            order.append(name)

        sent = [asyncio.create_task(one("flood")) for _ in range(40)]
        await waits(admission, 40)
        sent.append(asyncio.create_task(one("quiet")))
        await waits(admission, 41)
        for _ in range(2):
            admission.leave()
        await asyncio.gather(*sent)
        assert order.index("quiet") <= 4
        assert len(order) == 41


async def test_no_more_are_at_the_replicas_than_they_get(tmp_path: Path) -> None:
    async with running_door(tmp_path, replica_requests_max=3) as door:
        engine = await door.add_engine("replica-0")
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, engine.seen["running"])
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        assert await asyncio.gather(*(post(door, "", delay=0.01) for _ in range(30))) == [200] * 30
        watching.cancel()
        assert most == 3


async def test_a_class_goes_before_another(tmp_path: Path) -> None:
    keys = [limited(name, tenant=name, priority=name) for name in ("low", "high")]
    async with limited_door(tmp_path, *keys, replica_requests_max=1) as door:
        admission = await occupied(door, 1)
        order: list[str] = []

        async def one(name: str) -> None:
            assert await post(door, name) == 200
            order.append(name)

        sent = [asyncio.create_task(one("low")) for _ in range(4)]
        await waits(admission, 4)
        sent += [asyncio.create_task(one("high")) for _ in range(2)]
        await waits(admission, 6)
        admission.leave()
        await asyncio.gather(*sent)
        assert order == ["high"] * 2 + ["low"] * 4


async def test_a_request_that_may_not_wait_so_long_gets_503_and_leaves_no_trace(tmp_path: Path) -> None:
    async with running_door(tmp_path, replica_requests_max=1) as door:
        await door.add_engine("replica-0")
        admission = await occupied(door, 1)
        sent = {"json": COMPLETION, "headers": {"x-request-timeout": "0.05"}}
        status, body, found = await door.post("/v1/completions", **sent)
        assert (status, body["error"]["code"]) == (503, "queue_full")
        assert int(found["retry-after"]) >= 1
        status, body, _ = await door.post("/v1/completions", json=COMPLETION, headers={"x-request-timeout": "soon"})
        assert status == 400
        leaving = asyncio.create_task(post(door, ""))
        await waits(admission, 1)
        leaving.cancel()
        await waits(admission, 0)
        admission.leave()
        assert await post(door, "") == 200


async def test_the_end_of_the_gateway_ends_those_that_wait_too(tmp_path: Path) -> None:
    async with running_door(tmp_path, replica_requests_max=1) as door:
        await door.add_engine("replica-0")
        admission = await occupied(door, 1)
        sent = [asyncio.create_task(post(door, "")) for _ in range(3)]
        await waits(admission, 3)
        await door.relay.drain(0.05)
        assert await asyncio.gather(*sent) == [503] * 3
        assert admission.shown().waiting_requests == 0


async def test_who_finds_no_place_is_told_at_once_and_a_flood_gives_way() -> None:
    admission = Admission(Room(), lambda: 1)
    await admission.enter("a", NORMAL, 1)
    flood = [asyncio.create_task(admission.enter("flood", NORMAL, 1)) for _ in range(2)]
    await waits(admission, 2)
    with pytest.raises(QueueFull):
        await admission.enter("flood", NORMAL, 1)
    quiet = asyncio.create_task(admission.enter("quiet", NORMAL, 1))
    with pytest.raises(QueueFull):
        await flood[1]
    admission.leave()
    await flood[0]
    admission.leave()
    await quiet
    admission.leave()
    await admission.enter("a", NORMAL, 1)
    shown = admission.shown()
    assert (shown.waiting_requests, shown.waited_requests, shown.refused_requests) == (0, 3, 2)


async def test_a_request_whose_turn_would_come_too_late_is_refused_at_once() -> None:
    clock = Clock()
    admission = Admission(Room(), lambda: 1, clock)
    await admission.enter("a", NORMAL, 1)
    waiting = [asyncio.create_task(admission.enter(name, NORMAL, 1)) for name in ("b", "c")]
    await waits(admission, 2)
    for _ in range(2):
        clock.now += 1000.0
        admission.leave()
        await asyncio.sleep(0)
    await asyncio.gather(*waiting)
    first = asyncio.create_task(admission.enter("d", NORMAL, 1))
    await waits(admission, 1)
    with pytest.raises(QueueFull) as refused:
        await admission.enter("e", NORMAL, 1, seconds_max=5.0)
    assert refused.value.headers["retry-after"] == "200"
    assert "too late, as it may wait for 5 s. The expected wait is about 200 s." in refused.value.message
    admission.leave()
    await first


async def test_who_loses_its_place_is_told_the_wait_of_its_own_tenant() -> None:
    clock = Clock()
    admission = Admission(Room(), lambda: 1, clock)
    await admission.enter("a", NORMAL, 1)
    flood = [asyncio.create_task(admission.enter("flood", NORMAL, 1)) for _ in range(2)]
    await waits(admission, 2)
    clock.now += 100.0
    for _ in range(2):  # the second one measures: 10 s are between two turns
        admission.leave()
        await asyncio.sleep(0)
        clock.now += 100.0
    await asyncio.gather(*flood)
    flood = [asyncio.create_task(admission.enter("flood", NORMAL, 1)) for _ in range(2)]
    await waits(admission, 2)
    quiet = asyncio.create_task(admission.enter("quiet", NORMAL, 1))
    with pytest.raises(QueueFull) as refused:
        await flood[1]
    assert refused.value.headers["retry-after"] == "30"
    quiet.cancel()
    flood[0].cancel()
    await asyncio.gather(quiet, flood[0], return_exceptions=True)


async def test_room_is_for_each_replica_and_for_one_even_if_none_is_ready() -> None:
    ready = [2]
    admission = Admission(Room(), lambda: ready[0])
    for _ in range(2):
        await asyncio.wait_for(admission.enter("a", NORMAL, 1), 1)
    third = asyncio.create_task(admission.enter("a", NORMAL, 1))
    await waits(admission, 1)
    ready[0] = 0
    admission.leave()
    assert not third.done()
    admission.leave()
    await third


@pytest.mark.parametrize("value", [b"", b"-1", b"1e9", b"nan", b"5s", b"0", b"0.0"])
def test_a_timeout_is_a_number_of_seconds(value: bytes) -> None:
    assert timeout_of(None) is None
    assert timeout_of(b"0.5") == 0.5
    with pytest.raises(InvalidRequest):
        timeout_of(value)


async def test_the_first_one_may_wait_however_slow_it_was_before() -> None:
    clock = Clock()
    admission = Admission(Room(), lambda: 1, clock)
    await admission.enter("a", NORMAL, 1)
    for _ in range(20):  # slow ones, each with another one waiting
        waiting = asyncio.create_task(admission.enter("a", NORMAL, 1))
        await waits(admission, 1)
        clock.now += 1000
        admission.leave()
        await waiting
    waiting = asyncio.create_task(admission.enter("a", NORMAL, 1, 5.0))
    await waits(admission, 1)
    admission.leave()
    await waiting
    assert admission.shown().refused_requests == 0


async def test_replicas_that_become_ready_take_requests_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.relay.admission.LOOK_SECONDS", 0.01)
    ready = 1
    admission = Admission(Room(), lambda: ready)
    await admission.enter("a", NORMAL, 1)
    waiting = asyncio.create_task(admission.enter("a", NORMAL, 1))
    await waits(admission, 1)
    ready = 2
    await waiting
    assert (admission.shown().waiting_requests, admission.shown().refused_requests) == (0, 0)
