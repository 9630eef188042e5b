"""Metrics by tenant and model."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.api.usage import Usage
from gateway.relay.request_record import RequestRecord
from gateway.stats import request_metrics
from gateway.stats.prometheus import Metrics
from gateway.stats.request_log import RequestLog
from tests.unit.gateway.stats.test_request_log import delivered, record_of
from tests.unit.gateway.stats.test_snapshot import Scene
from tests.unit.transport.replica_tables import ReplicaTables


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """The value of a sample that has these labels among its own; there is one at most."""
    families = text_string_to_metric_families(metrics.render().decode())
    found = [
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) <= 1, found
    return found[0] if found else None


def measured(*records: RequestRecord) -> Metrics:
    metrics = Metrics()
    for record in records:
        metrics.answered(record)
    return metrics


def of(tenant: str, model: str = "m", **fields: Any) -> RequestRecord:
    return record_of(delivered(prompt_tokens=10, computed_tokens=10), tenant=tenant, model=model, **fields)


def test_first_tokens_of_streams_and_of_whole_answers_are_told_apart() -> None:
    metrics = measured(of("t"), of("t", streamed=True))
    name = "peerkv_time_to_first_token_seconds_sum"
    assert value(metrics, name, tenant="t", model="m", stream="false") == 2.0
    assert value(metrics, name, tenant="t", model="m", stream="true") == 3.5


def test_time_per_output_token_is_of_the_tokens_after_the_first() -> None:
    metrics = measured(of("t", usage=Usage(10, 5)))
    assert value(metrics, "peerkv_time_per_output_token_seconds_sum", tenant="t") == (4.0 - 2.0) / 4
    assert value(metrics, "peerkv_time_per_output_token_seconds_bucket", le="0.3") == 0
    assert value(metrics, "peerkv_time_per_output_token_seconds_bucket", le="0.5") == 1


def test_choices_side_by_side_and_single_tokens_have_no_time_per_output_token() -> None:
    several = record_of(delivered(), delivered(), tenant="t", model="m", usage=Usage(10, 5))
    metrics = measured(several, of("t", usage=Usage(10, 1)))
    assert value(metrics, "peerkv_time_per_output_token_seconds_count", tenant="t") == 0


def test_tokens_are_counted_by_tenant_and_source() -> None:
    imported = delivered(prompt_tokens=100, local_tokens=30, peer_tokens=50, computed_tokens=20, source="b")
    restored = delivered(prompt_tokens=100, peer_tokens=40, computed_tokens=60, source="b.host-memory")
    unrecorded = record_of(tenant="t", usage=Usage(8, 1))
    metrics = measured(record_of(imported, tenant="t", usage=Usage(100, 7)), record_of(restored, tenant="t"), unrecorded)
    counts = {
        source: value(metrics, "peerkv_tenant_prompt_tokens_total", tenant="t", source=source)
        for source in ("local", "peer", "host_memory", "computed", "unknown")
    }
    assert counts == {"local": 30, "peer": 50, "host_memory": 40, "computed": 80, "unknown": 8}
    assert value(metrics, "peerkv_tenant_generated_tokens_total", tenant="t") == 8


def test_the_wait_in_the_engine_is_its_queue() -> None:
    assert value(measured(of("t")), "peerkv_queue_seconds_sum", tenant="t") == 0.5


def test_refusals_are_counted_and_have_no_times() -> None:
    metrics = measured(RequestRecord("chat", status=401, error="invalid_api_key", first_byte_seconds=0.1))
    assert value(metrics, "peerkv_tenant_requests_total", tenant="", model="", status="401") == 1
    assert value(metrics, "peerkv_queue_seconds_count", tenant="") == 0


def test_the_list_of_models_is_no_tenants_request() -> None:
    assert value(measured(RequestRecord("models", status=200)), "peerkv_tenant_requests_total") is None


def test_further_tenants_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_metrics, "PAIRS_MAX", 2)
    metrics = measured(*(of(tenant) for tenant in ("a", "b", "c", "d", "a")))
    counts = {tenant: value(metrics, "peerkv_tenant_requests_total", tenant=tenant) for tenant in ("a", "b", "c", "(others)")}
    assert counts == {"a": 2, "b": 1, "c": None, "(others)": 2}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus")
def test_prometheus_finds_nothing_to_object_to_in_names_and_units(two_tables: ReplicaTables) -> None:
    metrics = measured(of("t", usage=Usage(10, 5)))
    metrics.attach(lambda: [Scene(two_tables).snapshot()])
    two_tables.start("a.host-memory", blocks=64)

    class File:
        written = dropped = 1

    metrics.registry.register(RequestLog(File()))
    done = subprocess.run(["promtool", "check", "metrics"], input=metrics.render(), capture_output=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")
