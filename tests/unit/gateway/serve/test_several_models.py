"""Several models in one configuration, over fake engines: start, figures, keeping, draining, failures, stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.fleet import FleetError, FleetSnapshot, FleetView
from gateway.serve import run
from gateway.settings import Settings
from gateway.settings_models import ModelSettings
from tests.unit.gateway.running_door import until
from tests.unit.gateway.serve.test_run import Process, free_port, peerkv

LARGE = '[[models]]\nmodel = "/no/large"\nserved_model_name = "large"\nmodel_aliases = ["gpt-4o"]\nreplicas = 2\n'
SMALL = '[[models]]\nmodel = "/no/small"\nserved_model_name = "small"\nreplicas = 1\n'


@contextlib.asynccontextmanager
async def several(
    directory: Path, *, small: str = SMALL, engine: str = "", command: str = "serve", **env: str
) -> AsyncIterator[Process]:
    """A running peerkv with a large and a small model."""
    file = directory / "peerkv.toml"
    file.write_text(LARGE + small)
    given = {"PEERKV_REPLICAS": "", "PEERKV_CONFIG": str(file), **env}
    async with peerkv(directory, command=command, engine=engine, **given) as running:
        yield running


async def post(process: Process, path: str, **body: Any) -> tuple[int, Any, Any]:
    async with process.session.post(process.url + path, json=body) as answer:
        return answer.status, await answer.json(), answer.headers


async def complete(process: Process, model: str, **more: Any) -> tuple[int, str]:
    """The status, and the replica that answered."""
    status, _, headers = await post(process, "/v1/completions", model=model, prompt="hello", max_tokens=2, **more)
    return status, headers.get("x-peerkv-replica", "")


def left(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(("run", "tables"))]


async def test_all_models_start_answer_and_end_without_a_trace(tmp_path: Path) -> None:
    async with several(tmp_path) as gateway:
        await gateway.ready(3)
        assert await complete(gateway, "small") == (200, "small-0")
        assert (await complete(gateway, "gpt-4o"))[1] in ("large-0", "large-1")
        assert (await complete(gateway, ""))[1] in ("large-0", "large-1")
        assert (await complete(gateway, "none"))[0] == 404
        _, listed = await gateway.get("/v1/models")
        assert [card["id"] for card in listed["data"]] == ["large", "gpt-4o", "small"]
        assert sorted(left(tmp_path)) == ["run-large", "run-small", "tables-large", "tables-small"]
        await until(lambda: any("serves small" in line for line in gateway.out))
        assert any("serves large" in line and "2 of 2" in line for line in gateway.out)
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
        assert left(tmp_path) == []
        assert not gateway.engines()


async def test_figures_are_each_models_own(tmp_path: Path) -> None:
    async with several(tmp_path) as gateway:
        await gateway.ready(3)
        answered = await post(gateway, "/v1/completions", model="small", prompt="hello" * 30, max_tokens=2)
        _, large = await gateway.get("/kv/stats")
        _, small = await gateway.get("/kv/stats?model=small")
        assert (large["model"], small["model"]) == ("large", "small")
        assert large["models"] == small["models"] == ["large", "small"]
        assert [replica["name"] for replica in large["replicas"]] == ["large-0", "large-1"]
        assert [replica["name"] for replica in small["replicas"]] == ["small-0"]
        assert (large["steering"]["planned"], small["steering"]["planned"]) == (0, 1)
        assert large["gateway"]["requests"] == small["gateway"]["requests"]
        assert (await gateway.get("/kv/stats?model=none"))[0] == 404
        assert (await gateway.get("/kv/prefixes?model=small"))[0] == 200
        _, explained = await gateway.get(f"/kv/explain/{answered[2]['x-request-id']}")
        assert [attempt["replica"] for attempt in explained["attempts"]] == ["small-0"]
        for model in ("small", "large"):
            body = {"model": model, "prompt": "hello", "max_tokens": 2}
            await gateway.session.post(gateway.url + "/v1/completions", json=body, headers={"x-request-id": "both"})
        _, explained = await gateway.get("/kv/explain/both")
        assert [attempt["model"] for attempt in explained["attempts"]] == ["small", "large"]
        _, ready = await gateway.get("/ready")
        assert [(each["model"], each["ready"]) for each in ready["models"]] == [("large", True), ("small", True)]
        assert {replica["name"]: replica["model"] for replica in ready["replicas"]}["small-0"] == "small"


async def test_metrics_have_the_model_as_a_label_and_come_once(tmp_path: Path) -> None:
    async with several(tmp_path) as gateway:
        await gateway.ready(3)
        await complete(gateway, "small")
        async with gateway.session.get(gateway.url + "/metrics") as answer:
            text = await answer.text()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    samples = [(sample.name, sample.labels) for family in families for sample in family.samples]
    assert len({(name, tuple(sorted(labels.items()))) for name, labels in samples}) == len(samples)
    planned = {s.labels["model"]: s.value for f in families for s in f.samples if s.name == "peerkv_steering_planned_total"}
    assert planned == {"large": 0, "small": 1}
    ready = [labels for name, labels in samples if name == "peerkv_replica_ready"]
    assert sorted((labels["model"], labels["replica"]) for labels in ready) == [
        *(("large", "large-0"), ("large", "large-1"), ("small", "small-0")),
    ]
    assert [labels for name, labels in samples if name == "peerkv_gateway_requests_total"] == [{}]


async def test_a_prefix_is_kept_by_the_replicas_of_its_model(tmp_path: Path) -> None:
    async with several(tmp_path, engine="--fake-core") as gateway:
        await gateway.ready(3)
        status, kept, _ = await post(gateway, "/kv/prefixes", model="small", ids=list(range(100)), pin=False)
        assert status == 201, kept
        assert [place["replica"] for place in kept["places"]] == ["small-0"]
        assert (await gateway.get("/kv/prefixes"))[1]["kept"] == []
        assert [each["id"] for each in (await gateway.get("/kv/prefixes?model=small"))[1]["kept"]] == [kept["id"]]
        status, flushed, _ = await post(gateway, "/kv/flush")
        assert sorted(flushed["flushed"]) == ["large-0", "large-1", "small-0"]
        async with gateway.session.delete(f"{gateway.url}/kv/prefixes/{kept['id']}") as answer:
            assert answer.status == 200
        async with gateway.session.delete(f"{gateway.url}/kv/prefixes/{kept['id']}") as answer:
            assert answer.status == 404
        assert (await post(gateway, "/kv/prefixes", model="none", ids=list(range(100))))[0] == 404


async def test_the_only_replica_of_a_model_is_not_drained_though_others_are_ready(tmp_path: Path) -> None:
    async with several(tmp_path) as gateway:
        await gateway.ready(3)
        _, shown = await gateway.get("/replicas")
        assert [replica["name"] for replica in shown["replicas"]] == ["large-0", "large-1", "small-0"]
        assert (await post(gateway, "/replicas/small-0/drain"))[0] == 409
        assert (await post(gateway, "/replicas/large-0/drain"))[0] == 200
        assert (await post(gateway, "/replicas/none/drain"))[0] == 400
        assert await complete(gateway, "large") == (200, "large-1")
        assert (await post(gateway, "/replicas/small-0/restart?force=true"))[0] == 202
        await until(lambda: _restarted(gateway, "small-0"))
        assert await complete(gateway, "small") == (200, "small-0")


async def test_a_model_whose_replicas_fail_leaves_the_others_serving(tmp_path: Path) -> None:
    engine = "--fake-exit-code 3 --fake-exit-on small-0"
    async with several(tmp_path, engine=engine, PEERKV_START_FAILURES_MAX="2") as gateway:
        await until(lambda: _state(gateway, "small-0", "failed"), 30)
        await gateway.ready(2)
        assert (await complete(gateway, "large"))[0] == 200
        assert (await complete(gateway, "small"))[0] == 503
        status, ready = await gateway.get("/ready")
        assert (status, [each["ready"] for each in ready["models"]]) == (200, [True, False])
        status, ready = await gateway.get("/ready?model=small")
        assert (status, ready["reason"], len(ready["replicas"])) == (503, "no replica is ready", 1)
        for name in ("large", "gpt-4o"):
            status, ready = await gateway.get(f"/ready?model={name}")
            assert (status, ready["model"]) == (200, "large")
        assert (await gateway.get("/ready?model=none"))[0] == 404
        await until(lambda: any("0 of 1" in line for line in gateway.out))
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0


async def test_a_replica_that_is_killed_is_replaced_by_none_of_another_model(tmp_path: Path) -> None:
    async with several(tmp_path, PEERKV_BACKOFF_SECONDS_MIN="60", PEERKV_BACKOFF_SECONDS_MAX="60") as gateway:
        await gateway.ready(3)
        os.kill(json.loads((tmp_path / "run-small" / "fleet.json").read_text())["replicas"][0]["pid"], signal.SIGKILL)
        await until(lambda: _state(gateway, "small-0", "backoff"))
        assert (await complete(gateway, "small"))[0] == 503
        answers = await asyncio.gather(*(complete(gateway, "large") for _ in range(4)))
        assert {status for status, _ in answers} == {200}


async def test_gateway_and_engines_apart_find_each_other_by_the_same_file(tmp_path: Path) -> None:
    async with several(tmp_path, command="engine") as engines, several(tmp_path, command="gateway") as gateway:
        await gateway.ready(3)
        assert await complete(gateway, "small") == (200, "small-0")
        assert (await complete(gateway, "large"))[0] == 200
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
        engines.signal(signal.SIGTERM)
        assert await engines.ended() == 0
        assert left(tmp_path) == []


async def test_a_gateway_waits_for_the_replicas_of_all_models_at_once_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[Path] = []
    all_begun = asyncio.Event()

    async def waited(fleet: FleetView, run_dir: Path, seconds: float) -> FleetSnapshot:
        begun.append(run_dir)
        if len(begun) == 2:
            all_begun.set()
        await all_begun.wait()
        raise FleetError("none came")

    monkeypatch.setattr(run, "_wait_for", waited)
    models = (ModelSettings(model="/no/large", name="large"), ModelSettings(model="/no/small", name="small"))
    settings = Settings(port=free_port(), run_dir=tmp_path / "run", models=models)
    with pytest.raises(FleetError, match="none came"):
        async with asyncio.timeout(30):
            await run.gateway(settings)
    assert begun == [tmp_path / "run-large", tmp_path / "run-small"]
    assert f"waiting for the replicas of {tmp_path}/run-large, {tmp_path}/run-small," in capsys.readouterr().err


async def test_replicas_that_do_not_come_are_told_of_with_the_directory_that_was_looked_in(tmp_path: Path) -> None:
    async with several(tmp_path, command="gateway", PEERKV_STARTUP_SECONDS_MAX="0.2") as gateway:
        assert await gateway.ended() == 1
        assert f"no replicas came up in {tmp_path}/run-large within 0.2 s" in gateway.err[-1]


async def _restarted(process: Process, name: str) -> bool:
    _, ready = await process.get("/ready")
    return any(replica["name"] == name and replica["ready"] and replica["restarts"] for replica in ready["replicas"])


async def _state(process: Process, name: str, state: str) -> bool:
    status, ready = await process.get("/ready")
    return status > 0 and any(each["name"] == name and each["state"] == state for each in ready["replicas"])
