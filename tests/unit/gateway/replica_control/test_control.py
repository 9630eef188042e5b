"""Replicas drained, resumed and restarted on request, over stand-ins for engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.fleet import ReplicaState
from engine.joined_fleet import JoinedFleet, NodesTold, NodeTold, write_nodes
from gateway.errors import ApiError, UnknownReplica
from gateway.kept_prefixes.prewarm import Prewarmer
from gateway.replica_control.control import NotNow, ReplicaControl, RunElsewhere
from gateway.replica_control.hand_over import HandOver
from gateway.replica_control.shapes import Step
from gateway.tenants.tenants import ANONYMOUS, TenantContext
from tests.unit.gateway.kept_prefixes.test_keeper import SALT, Scene, make
from tests.unit.gateway.running_door import until
from transport.node.messages import FleetTold, ReplicaTold

__all__ = ["make"]  # the fixture

IDS = list(range(2, 42))
OTHERS = list(range(100, 140))


class Controlled:
    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.in_flight: dict[str, int] = {}
        prewarmer = Prewarmer(scene.fleet, scene.upstream, scene.recorder, 10.0)
        self.control = ReplicaControl(
            scene.fleet,
            HandOver(scene.planner, prewarmer),
            lambda: self.in_flight,
            drain_seconds=30.0,
            startup_seconds_max=30.0,
        )

    async def asked_on(self, replica: str, ids: list[int], tenant: TenantContext = ANONYMOUS, first_block: int = 0) -> None:
        """Have a replica serve a prompt, and hold it from then on."""
        plan = await self.scene.planner.plan("completions", {"prompt": ids}, tenant, wanted_replica=replica)
        self.scene.planner.flights.started(plan.flight, 0.0)
        self.scene.planner.flights.finished(plan.flight, 1.0)
        self.scene.engines[replica].tables.hold(replica, ids, tenant.salt, first_block=first_block)

    def step(self, name: str) -> Step:
        return next(each.step for each in self.control.all().replicas if each.name == name)

    async def settled(self, name: str) -> Any:
        await until(lambda: self.step(name) is Step.NONE)
        return next(each for each in self.control.all().replicas if each.name == name)


@pytest.fixture
async def controlled(make: Callable[..., Any]) -> Controlled:
    return Controlled(await make())


async def test_a_drained_replica_hands_over_what_it_alone_holds_and_the_other_may_import_it(controlled: Controlled) -> None:
    scene = controlled.scene
    await controlled.asked_on("a", IDS)
    await controlled.asked_on("a", IDS, TenantContext("one", SALT), first_block=16)
    await controlled.asked_on("b", OTHERS)
    done = await controlled.control.drain("a")
    assert (done.state, done.step) == ("draining", Step.HANDING_OVER)
    assert [replica.name for replica in scene.fleet.snapshot().ready()] == ["b"]
    done = await controlled.settled("a")
    bodies = scene.engines["b"].bodies
    assert sorted(body.get("cache_salt", "") for body in bodies) == sorted(["", SALT])
    assert all(body["prompt"] == IDS[: len(body["prompt"])] and body["max_tokens"] == 1 for body in bodies)
    assert scene.engines["a"].bodies == []
    assert done.handed_over_tokens == sum(len(body["prompt"]) - 1 for body in bodies)
    assert {hint["source"] for hint in scene.engines["b"].hints} == {"a"}  # out of a's memory, as long as it lives
    resumed = await controlled.control.resume("a")
    assert (resumed.state, len(scene.fleet.snapshot().ready())) == ("ready", 2)


async def test_a_restart_waits_for_the_requests_that_the_replica_has(controlled: Controlled) -> None:
    scene = controlled.scene
    controlled.in_flight["a"] = 1
    done = await controlled.control.restart("a")
    assert (done.state, done.requests) == ("draining", 1)
    await until(lambda: controlled.step("a") is Step.DRAINING)
    with pytest.raises(NotNow, match="a is busy draining"):
        await controlled.control.restart("a")
    with pytest.raises(NotNow, match="No other replica than b is ready"):
        await controlled.control.restart("b")
    before = scene.fleet.snapshot().find("a")
    controlled.in_flight.clear()
    done = await controlled.settled("a")
    after = scene.fleet.snapshot().find("a")
    assert before is not None
    assert after is not None
    assert (done.state, done.failure, after.restarts) == ("ready", "", before.restarts + 1)


async def test_resuming_ends_a_restart_that_has_not_begun(controlled: Controlled) -> None:
    controlled.in_flight["a"] = 1
    await controlled.control.restart("a")
    done = await controlled.control.resume("a")
    assert (done.state, done.step) == ("ready", Step.NONE)
    controlled.in_flight.clear()
    found = controlled.scene.fleet.snapshot().find("a")
    assert found is not None
    assert found.restarts == 0


async def test_a_restart_that_fails_says_why(controlled: Controlled) -> None:
    async def restart(name: str) -> None:
        controlled.scene.fleet.set(name, ReplicaState.FAILED, reason="no memory")

    controlled.scene.fleet.restart = restart  # type: ignore[method-assign]
    await controlled.control.restart("a")
    assert (await controlled.settled("a")).failure == "no memory"


async def test_the_only_replica_is_restarted_by_force_alone(controlled: Controlled) -> None:
    controlled.scene.fleet.set("b", ReplicaState.STARTING)
    with pytest.raises(NotNow):
        await controlled.control.restart("a")
    await controlled.control.restart("a", force=True)
    assert (await controlled.settled("a")).failure == ""


async def test_the_only_replica_is_drained_by_force_alone(controlled: Controlled) -> None:
    controlled.scene.fleet.set("b", ReplicaState.STARTING)
    with pytest.raises(NotNow, match="No other replica than a is ready") as caught:
        await controlled.control.drain("a")
    assert caught.value.status == 409
    assert [replica.name for replica in controlled.scene.fleet.snapshot().ready()] == ["a"]
    assert (await controlled.control.drain("a", force=True)).state == "draining"
    assert (await controlled.settled("a")).state == "draining"
    assert (await controlled.control.drain("a")).state == "draining"  # as it is: that changes nothing for anybody


async def test_a_replica_of_another_node_is_shown_and_left_to_that_node(controlled: Controlled, tmp_path: Path) -> None:
    theirs = FleetTold("/models/m", "m", (), (ReplicaTold("replica-0", "ready", 2, "", "cpu"),))
    there = NodeTold("node-b", "10.0.0.2:7710", theirs, {"replica-0": "/run/node-b.replica-0.sock"})
    write_nodes(tmp_path, NodesTold("node-a", (there,)))
    fleet = controlled.scene.fleet
    own = replace(fleet.snapshot(), served_model_name="m", vllm_args=())
    fleet.snapshot = lambda: own  # type: ignore[method-assign]
    control = ReplicaControl(
        JoinedFleet(fleet, tmp_path), controlled.control._hand_over, dict, drain_seconds=1.0, startup_seconds_max=1.0
    )
    assert [(each.name, each.node) for each in control.all().replicas] == [
        ("a", ""),
        ("b", ""),
        ("node-b:replica-0", "node-b"),
    ]
    for work in (control.drain, control.resume, control.restart):
        with pytest.raises(RunElsewhere, match="by the gateway of node-b, which calls it replica-0") as caught:
            await work("node-b:replica-0")
        assert (caught.value.status, caught.value.code) == (409, "replica_runs_elsewhere")


async def test_what_is_run_elsewhere_is_drained_but_not_restarted(controlled: Controlled) -> None:
    controlled.scene.fleet.restarts = False
    with pytest.raises(RunElsewhere, match=r"run by `peerkv engine`.* have its operator restart it"):
        await controlled.control.restart("a")
    assert (await controlled.control.drain("a")).state == "draining"
    assert not controlled.control.all().restartable


async def test_a_hand_over_that_fails_is_no_hindrance(controlled: Controlled) -> None:
    await controlled.asked_on("a", IDS)
    controlled.scene.engines["b"].status = 500
    await controlled.control.restart("a")
    done = await controlled.settled("a")
    assert (done.failure, done.handed_over_tokens, len(controlled.scene.engines["b"].bodies)) == ("", 0, 1)


async def test_unknown_replicas_are_named_with_those_that_there_are(controlled: Controlled) -> None:
    for work in (controlled.control.drain, controlled.control.resume, controlled.control.restart):
        with pytest.raises(UnknownReplica) as caught:
            await work("nobody")
        assert isinstance(caught.value, ApiError)
    await asyncio.sleep(0)


async def test_requests_go_on_while_it_is_looked_at_what_can_be_handed_over(
    controlled: Controlled, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner, turns = controlled.scene.planner, 0
    monkeypatch.setattr(planner.prefixes, "top", lambda most: [(bytes(16), 16, 1, 0)] * 100)

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(others())
    hand_over = HandOver(planner, Prewarmer(controlled.scene.fleet, controlled.scene.upstream, controlled.scene.recorder, 10.0))
    assert await hand_over.run("replica-0") == 0
    beside.cancel()
    assert turns >= 100
