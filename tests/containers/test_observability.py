"""Prometheus with the shipped files reads a gateway under load, and every panel of the dashboard has something to show."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.containers.stack import MODEL, Stack, long_prompt, until

SCRAPES_SECONDS_MAX = 120.0
LOAD_SECONDS = 75.0  # rates want some scrapes, 15 s apart, that see the figures move


@pytest.fixture(scope="module")
def loaded(stack: Stack) -> Iterator[Stack]:
    """The stack while some clients ask: new prompts, known ones, imports, streams, a mistake, and more than a key allows."""
    stack.up()
    stack.wait_ready()
    tight = {"authorization": f"Bearer {stack.add_key('tight', '--requests-per-minute', '1')}"}
    done = threading.Event()

    def client() -> None:
        while not done.is_set():
            prompt = long_prompt(80)
            stack.complete(prompt, "replica-0")
            stack.complete(prompt, "replica-1")
            stack.complete(prompt)
            stack.complete("", max_tokens=-1)
            stack.client.post("/v1/completions", json={"model": MODEL, "prompt": "Hello", "max_tokens": 1}, headers=tight)
            body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "stream": True}
            with stack.client.stream("POST", "/v1/chat/completions", json=body) as answer:
                answer.read()

    clients = [threading.Thread(target=client) for _ in range(2)]
    for thread in clients:
        thread.start()
    try:
        began = time.monotonic()
        until(lambda: time.monotonic() - began > LOAD_SECONDS, LOAD_SECONDS + 10, "the load has lasted")
        yield stack
    finally:
        done.set()
        for thread in clients:
            thread.join()


def expressions(clone: Path) -> list[tuple[str, str]]:
    dashboard = json.loads((clone / "docker/grafana/dashboards/peerkv.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]


def test_every_expression_of_the_dashboard_returns_data(loaded: Stack, clone: Path) -> None:
    empty = []
    for title, expression in expressions(clone):
        asked = expression.replace("$__rate_interval", "1m").replace("$job", "peerkv").replace("$instance", ".*")
        found = loaded.query(asked)
        if not found or all(math.isnan(float(series["value"][1])) for series in found):
            empty.append((title, asked))
    assert empty == []


def test_every_rule_is_evaluated_without_an_error(loaded: Stack) -> None:
    url = f"http://127.0.0.1:{loaded.prometheus_port}/api/v1/rules"
    groups = httpx.get(url).raise_for_status().json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 15
    assert {rule["name"]: rule["lastError"] for rule in rules if rule.get("lastError")} == {}
    assert {rule["health"] for rule in rules} == {"ok"}


def test_no_alert_of_a_fault_fires_while_all_is_well(loaded: Stack) -> None:
    """Those of first tokens are left out: how fast this machine is, and what else it does, is no fault of the fleet's."""
    firing = {series["metric"]["alertname"] for series in loaded.query('ALERTS{alertstate="firing"}')}
    assert firing - {"PeerkvFirstTokenBudgetBurns", "PeerkvFirstTokenBudgetBurnsFast"} == set()


def test_the_shares_of_the_alerts_are_recorded(loaded: Stack) -> None:
    until(lambda: loaded.query("peerkv:first_byte_slow:ratio_rate5m"), SCRAPES_SECONDS_MAX, "a share is recorded")
    (cached,) = until(lambda: loaded.query("peerkv:cached_tokens:ratio_rate1h"), SCRAPES_SECONDS_MAX, "a share is recorded")
    assert 0 < float(cached["value"][1]) < 1


def promtool(*arguments: str, cwd: Path | None = None, text: str = "") -> str:
    program = shutil.which("promtool")
    assert program, "needs promtool: apt-get install prometheus"
    done = subprocess.run([program, *arguments], cwd=cwd, input=text, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_promtool_finds_nothing_wrong_with_the_files(clone: Path) -> None:
    files = clone / "docker/prometheus"
    assert promtool("check", "config", "--syntax-only", "prometheus.yml", cwd=files) == ""
    assert promtool("check", "rules", "alerts.yml", cwd=files) == ""
    assert promtool("test", "rules", "alerts_test.yml", cwd=files) == ""


def test_promtool_finds_nothing_wrong_with_the_configuration_in_its_container(loaded: Stack) -> None:
    """With the rules and the key's file, where they are mounted."""
    said = loaded.execute("prometheus", "promtool", "check", "config", "/etc/prometheus/prometheus.yml").stdout
    assert "is valid prometheus config file syntax" in said
    assert "rules found" in said


def test_promtool_finds_nothing_wrong_with_the_metrics(loaded: Stack) -> None:
    """With ours: the replicas' own are there too, by vLLM's names."""
    lines = loaded.client.get("/metrics", headers=loaded.admin).raise_for_status().text.splitlines(keepends=True)
    ours = [line for line in lines if line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith("peerkv_")]
    assert any(line.startswith("vllm:num_requests_running{") and 'replica="replica-1"' in line for line in lines)
    assert promtool("check", "metrics", text="".join(ours)) == ""
