"""vLLM's metrics through the gateway: those that answer are shown, the others cost their lines and no more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.fleet import ReplicaState
from gateway.stats import replica_metrics
from gateway.stats.replica_metrics import ReplicaMetrics
from tests.unit.gateway.relay.relay_client import COMPLETION
from tests.unit.gateway.running_door import Door, running_door


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with running_door(tmp_path) as door:
        yield door


async def shown(door: Door, name: str) -> dict[str, float]:
    """The values of a metric by replica."""
    text = (await ReplicaMetrics([door.fleet], door.upstream).render()).decode()
    return {
        sample.labels["replica"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


async def test_each_replicas_metrics_have_its_name(door: Door) -> None:
    for name in ("replica-0", "replica-1"):
        await door.add_engine(name)
    await door.post("/v1/completions", COMPLETION)
    assert await shown(door, "vllm:request_success_total") == {"replica-0": 1, "replica-1": 0}
    assert await shown(door, "process_open_fds") == {"replica-0": 7, "replica-1": 7}
    assert await shown(door, "peerkv_replica_metrics_answered") == {"replica-0": 1, "replica-1": 1}


async def test_a_replica_that_is_silent_gone_or_talks_too_much_costs_its_lines(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_metrics, "ANSWER_SECONDS_MAX", 0.3)
    monkeypatch.setattr(replica_metrics, "ANSWER_BYTES_MAX", 4096)
    await door.add_engine("well")
    (await door.add_engine("silent")).metrics_delay = 60.0
    (await door.add_engine("talkative")).metrics_text = "# " + "x" * 5000
    door.fleet.put("gone", door.directory / "nothing.sock")
    assert await shown(door, "vllm:request_success_total") == {"well": 0}
    assert await shown(door, "peerkv_replica_metrics_answered") == {"well": 1, "silent": 0, "talkative": 0, "gone": 0}


async def test_only_replicas_that_serve_are_asked(door: Door) -> None:
    for name, state in (("replica-0", ReplicaState.DRAINING), ("replica-1", ReplicaState.STARTING)):
        await door.add_engine(name)
        door.fleet.set_state(name, state)
    assert await shown(door, "peerkv_replica_metrics_answered") == {"replica-0": 1}


async def test_without_replicas_there_is_nothing_to_show(door: Door) -> None:
    assert await shown(door, "peerkv_replica_metrics_answered") == {}
