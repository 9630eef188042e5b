"""The figures of several models: each has its own, and those of the gateway itself are taken once."""

from __future__ import annotations

from collections import Counter

import pytest

from gateway.limits.shapes import SharedLimitStats, TenantUse
from gateway.relay.counters import RelayCounters
from gateway.stats.all_figures import AllFigures
from gateway.stats.node_stats import NodeStats
from gateway.stats.process_figures import ProcessFigures, ProcessStats
from gateway.stats.prometheus import Metrics
from gateway.stats.shapes import KvStats
from tests.unit.gateway.stats.test_snapshot import Scene
from tests.unit.transport.replica_tables import ReplicaTables

MODELS = ("large", "small")


class ModelFigures:
    """A scene under the name of a model."""

    def __init__(self, scene: Scene, model: str) -> None:
        self.scene, self.model = scene, model

    def stats(self, process: ProcessStats) -> KvStats:
        return self.scene.view.snapshot(process).model_copy(update={"model": self.model})

    def warnings(self) -> list[str]:
        return ["of a replica"]


class Gateway:
    """Counts how often each of its figures is taken."""

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()

    def counts(self) -> tuple[RelayCounters, int]:
        self.taken["counts"] += 1
        return RelayCounters(requests=7), 1

    def uses(self) -> list[TenantUse]:
        self.taken["limits"] += 1
        return [TenantUse(tenant="t", requests=3)]

    def nodes(self) -> list[NodeStats]:
        self.taken["nodes"] += 1
        return []

    def stats(self) -> SharedLimitStats:
        self.taken["shared limits"] += 1
        return SharedLimitStats(up=1)

    def warnings(self) -> list[str]:
        self.taken["warnings"] += 1
        return ["of the shared limits"]


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
def figures(two_tables: ReplicaTables, gateway: Gateway) -> AllFigures:
    scene = Scene(two_tables)
    process = ProcessFigures(gateway.counts, limit_uses=gateway.uses, shared_limits=gateway, nodes=gateway.nodes)
    fleets = [ModelFigures(scene, model) for model in MODELS]
    return AllFigures(fleets, lambda model: MODELS.index(model or MODELS[0]), process, measured=Metrics())


async def test_figures_of_the_gateway_itself_are_taken_once_for_all_models(figures: AllFigures, gateway: Gateway) -> None:
    text = (await figures.metrics())[0].decode()
    assert gateway.taken == {"counts": 1, "limits": 1, "shared limits": 1, "nodes": 1}
    assert "\npeerkv_gateway_requests_total 7.0\n" in text
    assert '\npeerkv_limit_requests_total{tenant="t"} 3.0\n' in text
    assert "\npeerkv_shared_limits_up 1.0\n" in text
    assert all(f'peerkv_steering_planned_total{{model="{model}"}} 0.0\n' in text for model in MODELS)


def test_the_figures_of_a_model_have_those_of_the_gateway_beside_them(figures: AllFigures, gateway: Gateway) -> None:
    stats = figures.stats("small")
    assert (stats.model, stats.models, stats.gateway.requests) == ("small", ["large", "small"], 7)
    assert ([use.tenant for use in stats.limits], stats.shared_limits) == (["t"], SharedLimitStats(up=1))
    assert set(gateway.taken.values()) == {1}


def test_a_warning_comes_once_though_it_holds_for_all_models(figures: AllFigures, gateway: Gateway) -> None:
    assert figures.warnings() == ["of a replica", "of the shared limits"]
    assert gateway.taken == {"warnings": 1}
