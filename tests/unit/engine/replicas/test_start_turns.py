"""Replicas on one GPU start one after the other."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.fleet import ReplicaState
from engine.replicas.launch import EngineSettings, plan_launches
from engine.replicas.lifecycle import LifecycleAction
from engine.replicas.member import Member
from engine.replicas.start_turns import StartTurns

SETTINGS = EngineSettings("m", Path("/run/p"), Path("/dev/shm/p"), Path("/log/p"), replicas=4, replicas_per_gpu=2)


def members(*devices: str) -> list[Member]:
    settings = replace(SETTINGS, devices=devices, replicas_per_gpu=2 if devices else 1)
    return [Member(launch, settings) for launch in plan_launches(settings, {}, 8)]


def start(member: Member, now: float = 0.0) -> None:
    assert member.life.start(now) is LifecycleAction.SPAWN


@pytest.fixture
def four() -> list[Member]:
    """Replicas 0 and 2 on GPU 0, 1 and 3 on GPU 1."""
    return members("0", "1")


def held(turns: StartTurns, those: list[Member]) -> list[bool]:
    found = []
    for member in those:
        start(member)
        found.append(turns.hold(member))
    return found


def test_one_at_a_time_starts_on_each_gpu_and_the_next_one_when_it_is_ready(four: list[Member]) -> None:
    turns = StartTurns(four)
    assert held(turns, four) == [False, False, True, True]
    assert four[2].life.reason == "waiting until replica-0 has started on the same GPU"
    assert turns.due(1.0) == []
    four[0].life.answered(5.0)
    assert turns.due(5.0) == [four[2]]
    assert four[2].life.reason == "loading the model"
    assert turns.due(6.0) == []
    four[1].life.exited("failed", 7.0)
    assert turns.due(7.0) == [four[3]]


def test_a_wait_does_not_count_as_the_time_that_a_start_may_take(four: list[Member]) -> None:
    turns = StartTurns(four)
    held(turns, four)
    assert four[2].life.due is None
    four[0].life.answered(500.0)
    turns.due(500.0)
    assert four[2].life.due == 500.0 + SETTINGS.startup_seconds_max


def test_one_that_is_ended_while_it_waits_waits_no_longer(four: list[Member]) -> None:
    turns = StartTurns(four)
    held(turns, four)
    assert four[2].life.stop(1.0, 5.0) is LifecycleAction.TERMINATE
    assert turns.forget(four[2])
    assert not turns.forget(four[2])
    four[2].life.exited("it had not been started", 1.0)
    assert four[2].life.state is ReplicaState.STOPPED
    four[0].life.answered(5.0)
    assert turns.due(5.0) == []


def test_on_the_cpu_all_start_at_once() -> None:
    those = members()
    assert held(StartTurns(those), those) == [False] * 4
