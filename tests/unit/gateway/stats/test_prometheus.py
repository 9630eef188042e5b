"""Prometheus metrics."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.limits.shapes import KeyUse, LimitUse, QueueStats, SharedLimitStats, TenantUse
from gateway.prompts.parity import ParityCounts
from gateway.relay.request_record import RequestRecord
from gateway.stats.prometheus import Metrics
from gateway.steering.costs.model import CostStats, PrefillStats
from tests.unit.gateway.ledger.begun_attempts import begun
from tests.unit.gateway.stats.test_snapshot import Scene
from tests.unit.transport.replica_tables import ReplicaTables
from transport.table.deliveries import Delivery, FromSource


@pytest.fixture
def scene(two_tables: ReplicaTables) -> Scene:
    return Scene(two_tables)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_answers_are_counted_and_timed_by_endpoint() -> None:
    metrics = Metrics()
    metrics.answered(RequestRecord("completions", status=200, seconds=0.2))
    metrics.answered(RequestRecord("completions", status=400, seconds=0.1))
    metrics.answered(RequestRecord("chat", status=200, seconds=0.3, first_byte_seconds=0.05))
    found = samples(metrics)
    assert found["peerkv_gateway_answers_total", ("completions", "200")] == 1
    assert found["peerkv_gateway_request_seconds_count", ("completions",)] == 2
    assert found["peerkv_gateway_request_seconds_sum", ("completions",)] == pytest.approx(0.3)
    assert found["peerkv_gateway_first_byte_seconds_bucket", ("chat", "0.05")] == 1
    assert ("peerkv_gateway_first_byte_seconds_count", ("completions",)) not in found


def test_the_replicas_counters_are_read_at_each_scrape(scene: Scene) -> None:
    metrics = Metrics()
    metrics.attach(lambda: [scene.snapshot()])
    before = samples(metrics)
    scene.count("a", peer_tokens_shared_memory=30, import_bytes=1 << 20, check_failures=2, import_nanoseconds=500_000_000)
    scene.tables.hold("b", list(range(8)))
    found = samples(metrics)
    assert before["peerkv_prompt_tokens_total", ("a", "peer_shared_memory")] == 0
    assert found["peerkv_prompt_tokens_total", ("a", "peer_shared_memory")] == 30
    assert found["peerkv_import_bytes_total", ("a",)] == 1 << 20
    assert found["peerkv_import_seconds_total", ("a",)] == 0.5
    assert found["peerkv_check_failures_total", ("a",)] == 2
    assert found["peerkv_cached_blocks", ("b",)] == 2
    assert found["peerkv_replica_ready", ("b",)] == 1
    assert found["peerkv_replica_exchanges", ("b",)] == 1


def test_limits_are_told_by_tenant(scene: Scene) -> None:
    limits = {"requests_per_minute": LimitUse(limit=5, used=3)}
    use = TenantUse(tenant="t", requests=3, uncached_tokens=10, cached_tokens=30, generated_tokens=5, charged_tokens=18)
    use.refused["requests_per_minute"] = 2
    use.keys += [KeyUse(key=key, requests_in_flight=2, limits=limits) for key in ("a", "b")]
    metrics = Metrics()
    metrics.attach(lambda: [scene.snapshot().model_copy(update={"limits": [use]})])
    found = samples(metrics)
    assert found["peerkv_limit_requests_total", ("t",)] == 3
    assert found["peerkv_limit_refused_requests_total", ("requests_per_minute", "t")] == 2
    assert found["peerkv_limit_tokens_total", ("cached", "t")] == 30
    assert found["peerkv_limit_charged_tokens_total", ("t",)] == 18
    assert found["peerkv_limit_in_flight_requests", ("t",)] == 4


def test_what_is_used_of_a_limit_is_that_of_the_tenants_fullest_key(scene: Scene) -> None:
    """A sum over the keys would be far from the limits of all when one of them gets 429."""

    def key(name: str, **limits: tuple[int, int]) -> KeyUse:
        uses = {limit: LimitUse(used=used, limit=most) for limit, (used, most) in limits.items()}
        return KeyUse(key=name, requests_in_flight=0, limits=uses)

    first, second = TenantUse(tenant="t"), TenantUse(tenant="u")
    first.keys += [
        key("idle", tokens_per_day=(0, 10)),
        key("full", tokens_per_day=(95, 100), requests_per_minute=(1, 60)),
        key("large", tokens_per_day=(500, 1000), requests_per_minute=(9, 60)),
    ]
    second.keys += [key("other", tokens_per_day=(0, 7))]
    metrics = Metrics()
    metrics.attach(lambda: [scene.snapshot().model_copy(update={"limits": [first, second, TenantUse(tenant="none")]})])
    found = samples(metrics)
    told = {
        labels: (value, found["peerkv_limit_allowed", labels])
        for (name, labels), value in found.items()
        if name == "peerkv_limit_used"
    }
    assert told == {
        ("tokens_per_day", "t"): (95, 100),
        ("requests_per_minute", "t"): (9, 60),
        ("tokens_per_day", "u"): (0, 7),
    }


def test_waiting_for_room_is_told(scene: Scene) -> None:
    metrics = Metrics()
    queue = QueueStats(waiting_requests=3, waited_requests=9, waited_seconds=4.5, refused_requests=2)
    metrics.attach(lambda: [scene.snapshot().model_copy(update={"queue": queue})])
    found = samples(metrics)
    assert found["peerkv_admission_waiting_requests", ()] == 3
    assert found["peerkv_admission_waited_requests_total", ()] == 9
    assert found["peerkv_admission_waited_seconds_total", ()] == 4.5
    assert found["peerkv_admission_refused_requests_total", ()] == 2


def test_a_replica_without_a_table_exchanges_nothing(scene: Scene) -> None:
    metrics = Metrics()
    metrics.attach(lambda: [scene.snapshot()])
    scene.tables.stop("a")
    found = samples(metrics)
    assert [found["peerkv_replica_exchanges", (name,)] for name in ("a", "b")] == [0, 1]


def test_counters_do_not_fall_when_a_replica_restarts(scene: Scene) -> None:
    metrics = Metrics()
    metrics.attach(lambda: [scene.snapshot()])
    scene.count("a", imports=4)
    seen = [samples(metrics)["peerkv_imports_total", ("a",)]]
    scene.tables.stop("a")
    seen.append(samples(metrics)["peerkv_imports_total", ("a",)])
    scene.tables.start("a")
    scene.count("a", imports=1)
    seen.append(samples(metrics)["peerkv_imports_total", ("a",)])
    assert seen == [4, 4, 5]


def test_the_gateways_counts_and_parity_are_metrics_too(scene: Scene) -> None:
    metrics = Metrics()
    metrics.attach(lambda: [scene.snapshot()])
    scene.planner.prompts.parity_counts = ParityCounts(checks=3, failures=1, differences_found=2)
    found = samples(metrics)
    assert [found[f"peerkv_parity_{name}_total", ()] for name in ("checks", "failures", "differences_found")] == [3, 1, 2]
    assert found["peerkv_gateway_requests_total", ()] == 7
    assert found["peerkv_gateway_in_flight_requests", ()] == 2
    assert found["peerkv_steering_planned_total", ()] == 0
    assert found["peerkv_parity_exact", ("chat",)] == 0


def test_losses_peers_load_costs_and_verdicts_have_metrics(scene: Scene) -> None:
    metrics = Metrics()
    metrics.attach(lambda: [scene.snapshot()])
    scene.recorder.feed.add(metrics.imports.delivered)
    writer = scene.tables.writers["a"]
    writer.imported("b", "shared_memory", blocks=3, size=6_000_000, nanoseconds=2_000_000, failed=True)
    writer.tell_load([1, 2, 300, 4, 5, 6])
    scene.planner.fleet.now()
    attempt = begun(7)
    scene.recorder.ledger.open(attempt)
    record = Delivery(
        tag=7, scheduled_ns=1, first_token_ns=2, prompt_tokens=100, computed_tokens=100,
        import_ns=2_000_000, import_wait_ns=30_000_000, source="b",
    )  # fmt: skip
    writer.deliver(record, "shared_memory")
    scene.recorder.ended(attempt, 200)
    found = samples(metrics)
    pair = ("b", "a", "shared_memory")  # labels by name: peer, replica, transport
    assert found["peerkv_ledger_requests_total", ("cold",)] == 1
    assert found["peerkv_ledger_lost_tokens_total", ("evicted",)] == 0
    assert found["peerkv_ledger_computed_tokens_total", ()] == 100
    assert found["peerkv_peer_import_bytes_total", pair] == 6_000_000
    assert found["peerkv_peer_import_seconds_total", pair] == 0.002
    assert found["peerkv_peer_import_blocks_total", pair] == 3
    assert found["peerkv_peer_import_failures_total", pair] == 1
    assert found["peerkv_engine_imports_under_way", ("a",)] == 5
    assert found["peerkv_import_copy_seconds_bucket", ("0.0025", *pair)] == 1
    assert found["peerkv_import_wait_seconds_bucket", ("0.025", *pair)] == 0
    assert found["peerkv_import_wait_seconds_bucket", ("0.05", *pair)] == 1
    assert found["peerkv_cost_samples_total", ()] == 0
    assert found["peerkv_parity_verdict", ("chat", "unknown")] == 1
    assert found["peerkv_parity_verdict", ("chat", "exact")] == 0


def test_what_comes_from_another_node_has_a_label_of_its_own(scene: Scene) -> None:
    metrics = Metrics()
    metrics.attach(lambda: [scene.snapshot()])
    scene.recorder.feed.add(metrics.imports.delivered)
    writer = scene.tables.writers["a"]
    writer.imported("node-b:c", "network", blocks=3, size=6_000_000, nanoseconds=2_000_000, failed=False)
    scene.planner.fleet.now()
    writer.deliver(Delivery(tag=7, scheduled_ns=1, first_token_ns=2, import_wait_ns=1, source="node-b:c"), "network")
    scene.planner.feed.poll("a")
    found = samples(metrics)
    pair = ("node-b:c", "a", "network")
    assert found["peerkv_peer_import_bytes_total", pair] == 6_000_000
    assert found["peerkv_import_copy_seconds_count", pair] == 1


def test_the_time_of_an_import_from_several_sources_is_none_of_theirs(scene: Scene) -> None:
    metrics = Metrics()
    metrics.attach(lambda: [scene.snapshot()])
    scene.recorder.feed.add(metrics.imports.delivered)
    scene.planner.fleet.now()
    record = Delivery(
        tag=7, scheduled_ns=1, first_token_ns=2, prompt_tokens=100, peer_tokens=96, computed_tokens=4,
        import_ns=2_000_000, import_wait_ns=30_000_000, source="b", further=(FromSource("disk", 32),),
    )  # fmt: skip
    scene.tables.writers["a"].deliver(record, "shared_memory")
    scene.recorder.catch_up()
    found = samples(metrics)
    assert found["peerkv_import_copy_seconds_count", ("(several)", "a", "(several)")] == 1
    assert found["peerkv_import_wait_seconds_count", ("(several)", "a", "(several)")] == 1
    assert ("peerkv_import_copy_seconds_count", ("b", "a", "shared_memory")) not in found


def test_the_server_of_shared_limits_is_told_of_where_there_is_one(scene: Scene) -> None:
    metrics, alone = Metrics(), Metrics()
    shared = SharedLimitStats(up=1, alone_requests=3, failures=2, waiting_settlements=4)
    metrics.attach(lambda: [scene.snapshot().model_copy(update={"shared_limits": shared})])
    alone.attach(lambda: [scene.snapshot().model_copy(update={"shared_limits": None})])
    text = metrics.render().decode()
    for line in (
        "up 1.0",
        "alone_requests_total 3.0",
        "failures_total 2.0",
        "waiting_settlements 4.0",
        "lost_settlements_total 0.0",
    ):
        assert f"\npeerkv_shared_limits_{line}\n" in text
    assert "peerkv_shared_limits" not in alone.render().decode()


def test_two_names_of_one_model_are_told_apart_wherever_it_is_learnt_what_the_model_takes(scene: Scene) -> None:
    learnt = PrefillStats("cpu", "3f2a", 20, 0.1, 1.0, 0.01, 1e-6, 1e-4, 1e-9, 1e-3)
    costs = CostStats(prefill=(learnt,))
    metrics = Metrics()
    found = [scene.snapshot().model_copy(update={"model": name, "costs": costs}) for name in ("quick", "long")]
    metrics.attach(lambda: found)
    families = list(text_string_to_metric_families(metrics.render().decode()))
    shown = [(each.name, tuple(sorted(each.labels.items()))) for family in families for each in family.samples]
    assert len(set(shown)) == len(shown)
    [fixed] = [
        dict(labels)
        for name, labels in shown
        if name == "peerkv_cost_prefill_seconds" and ("model", "long") in labels and ("term", "fixed_seconds") in labels
    ]
    assert fixed == {"model": "long", "exported_model": "3f2a", "device": "cpu", "term": "fixed_seconds"}
