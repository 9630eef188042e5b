"""Alerts and the dashboard: every metric is one that the gateway has, every alert is tested, and panels lie side by side."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import pairwise
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.relay.request_record import RequestRecord
from gateway.stats.prometheus import Metrics
from tests.unit.gateway.stats.test_snapshot import Scene
from tests.unit.packaging.files import DOCKER, read_yaml
from tests.unit.transport.replica_tables import ReplicaTables

RULES = [rule for group in read_yaml("prometheus/alerts.yml")["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
CASES = [case for test in read_yaml("prometheus/alerts_test.yml")["tests"] for case in test["alert_rule_test"]]
DASHBOARD: dict[str, Any] = json.loads((DOCKER / "grafana/dashboards/peerkv.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
METRIC = re.compile(r"\b(?:peerkv_\w+|peerkv:[\w:]+)")


@pytest.fixture
def exposed(two_tables: ReplicaTables) -> set[str]:
    """The names that a gateway's /metrics has, those of histograms' parts among them."""
    metrics = Metrics()
    scene = Scene(two_tables)
    metrics.attach(lambda: [scene.snapshot()])
    metrics.answered(RequestRecord("chat", status=200, seconds=0.3, first_byte_seconds=0.05))
    families = list(text_string_to_metric_families(metrics.render().decode()))
    names = {sample.name for family in families for sample in family.samples}
    # What has labels alone has no sample before the first of its kind.
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
    return names | {family.name + suffix for family in families for suffix in suffixes.get(family.type, ())}


def metrics_of(expression: str) -> set[str]:
    return set(METRIC.findall(expression))


def test_every_rule_reads_metrics_that_there_are(exposed: set[str]) -> None:
    for rule in RULES:
        assert metrics_of(rule["expr"]) <= exposed | RECORDED, rule
        assert metrics_of(rule["expr"]) or "up{" in rule["expr"]


def test_every_panel_reads_metrics_that_there_are(exposed: set[str]) -> None:
    for panel in PANELS:
        assert panel["targets"]
        for target in panel["targets"]:
            found = metrics_of(target["expr"])
            assert found, panel["title"]
            assert found <= exposed, panel["title"]


@pytest.mark.parametrize("name", [alert["alert"] for alert in ALERTS])
def test_every_alert_is_tested_where_it_fires_and_where_it_does_not(name: str) -> None:
    fired = {bool(case["exp_alerts"]) for case in CASES if case["alertname"] == name}
    assert fired == {True, False}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_says_how_bad_it_is_and_what_to_look_at(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["description"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus")
@pytest.mark.parametrize("command", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")])
def test_prometheus_accepts_the_rules_and_they_do_what_their_tests_say(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=DOCKER / "prometheus", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_asks_the_gateway_with_the_key_that_compose_gives_it() -> None:
    config = read_yaml("prometheus/prometheus.yml")
    (job,) = config["scrape_configs"]
    compose = read_yaml("compose.yaml")
    (secret,) = compose["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert job["static_configs"] == [{"targets": ["gateway:8000"]}]
    assert all((DOCKER / "prometheus" / file).exists() for file in config["rule_files"])


def test_rules_and_dashboard_know_the_job_by_the_same_name() -> None:
    (job,) = read_yaml("prometheus/prometheus.yml")["scrape_configs"]
    assert {name for rule in RULES for name in re.findall(r'job="(\w+)"', rule["expr"])} == {job["job_name"]}


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    rows: dict[int, list[dict[str, int]]] = {}
    for panel in panels:
        rows.setdefault(panel["gridPos"]["y"], []).append(panel["gridPos"])
    for places in rows.values():
        ordered = sorted(places, key=lambda place: place["x"])
        assert all(left["x"] + left["w"] <= right["x"] for left, right in pairwise(ordered))
        assert ordered[-1]["x"] + ordered[-1]["w"] <= 24
    tops = sorted(rows)
    assert all(upper + max(place["h"] for place in rows[upper]) <= lower for upper, lower in pairwise(tops))


def test_grafana_finds_the_dashboard_and_the_prometheus_of_compose() -> None:
    (volume,) = [v for v in read_yaml("compose.yaml")["services"]["grafana"]["volumes"] if v.startswith("./grafana:")]
    mounted = volume.split(":")[1]
    (provider,) = read_yaml("grafana/dashboards/peerkv.yaml")["providers"]
    assert provider["options"]["path"] == f"{mounted}/dashboards"
    (source,) = read_yaml("grafana/datasources/prometheus.yaml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    home = read_yaml("compose.yaml")["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DOCKER / "grafana" / home.removeprefix(f"{mounted}/")).exists()
