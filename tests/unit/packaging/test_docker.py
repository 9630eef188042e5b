"""compose.yaml and the images: what the containers share, what they may do, and that their commands are real ones."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.fleet import FleetSnapshot, Replica, ReplicaState, write_fleet
from engine.host_process.host import SHUTDOWN_SECONDS_MAX
from gateway.cli.main import build_parser
from gateway.settings import Settings, load

REPOSITORY = Path(__file__).parents[3]
DOCKER = REPOSITORY / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
WORKERS = ("engine-cpu", "engine-gpu", "gateway")
DOCKERFILES = ("gateway.Dockerfile", "engine.Dockerfile")


def environment(service: str) -> dict[str, str | None]:
    return SERVICES[service]["environment"]


def started(profile: str) -> set[str]:
    return {name for name, service in SERVICES.items() if profile in service.get("profiles", [profile])}


def test_a_plain_up_runs_the_cpu_profile() -> None:
    lines = (DOCKER / ".env").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == ["COMPOSE_PROFILES=cpu"]
    assert started("cpu") == {"namespaces", "engine-cpu", "gateway"}
    assert started("gpu") == {"namespaces", "engine-gpu", "gateway"}


@pytest.mark.parametrize("name", WORKERS)
def test_all_share_one_ipc_and_one_pid_namespace(name: str) -> None:
    assert SERVICES["namespaces"]["ipc"] == "shareable"
    assert SERVICES[name]["ipc"] == SERVICES[name]["pid"] == "service:namespaces"
    assert SERVICES[name]["depends_on"]["namespaces"] == {"condition": "service_started"}


@pytest.mark.parametrize("engine", ["engine-cpu", "engine-gpu"])
def test_gateway_and_engine_host_agree_where_things_are(engine: str) -> None:
    for variable in ("PEERKV_RUN_DIR", "PEERKV_TABLE_DIR"):
        assert environment(engine)[variable] == environment("gateway")[variable] is not None
    assert str(environment(engine)["PEERKV_TABLE_DIR"]).startswith("/dev/shm/")
    for volume in ("run:/run/peerkv", "models:/models"):
        assert volume in SERVICES[engine]["volumes"]
        assert {volume, f"{volume}:ro"} & set(SERVICES["gateway"]["volumes"])


@pytest.mark.parametrize("name", SERVICES)
def test_no_container_has_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "user"} & set(service)


def test_only_the_gateway_is_published_and_only_on_loopback() -> None:
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"gateway"}
    (port,) = SERVICES["gateway"]["ports"]
    assert port.startswith("127.0.0.1:")
    assert port.endswith(":8000")


def test_the_gpu_engine_sees_all_gpus() -> None:
    (device,) = SERVICES["engine-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "deploy" not in SERVICES["engine-cpu"]


@pytest.mark.parametrize("name", WORKERS)
def test_each_command_is_one_that_peerkv_knows(name: str) -> None:
    parsed = build_parser().parse_args(SERVICES[name]["command"])
    assert callable(parsed.run)
    for variable in environment(name):
        if variable.startswith("PEERKV_"):
            assert variable.removeprefix("PEERKV_").lower() in Settings.model_fields


def settings_of_the_readme() -> set[str]:
    """The names in the first column of README's settings table, as `Settings` has them."""
    table = (REPOSITORY / "README.md").read_text().split("## Settings", 1)[1].split("\n## ", 1)[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    words = {word for cell in cells for word in re.findall(r"`([^`]+)`", cell)}
    names = {word.removeprefix("--").removeprefix("PEERKV_").replace("-", "_").lower() for word in words}
    assert {"model", "replicas", "tenants", "drain_seconds"} <= names <= Settings.model_fields.keys()
    return names


def test_every_setting_that_the_readme_names_reaches_the_containers() -> None:
    passed = settings_of_the_readme() - {"host", "port"} | {"vllm_args", "log_level"}  # where it listens is compose's own
    secrets = {"admin_key", "tenants"}
    for service, names in (("gateway", passed), ("engine-cpu", passed - secrets), ("engine-gpu", passed - secrets)):
        for name in names:
            variable = f"PEERKV_{name.upper()}"
            assert environment(service)[variable] == f"${{{variable}:-}}"


def test_an_empty_variable_means_that_it_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in environment("gateway").items():
        monkeypatch.setenv(variable, "" if str(value).startswith("$") else str(value))
    fixed = {"run_dir", "table_dir"}
    assert load().model_dump(exclude=fixed) == Settings.model_construct().model_dump(exclude=fixed)


@pytest.mark.parametrize("name", WORKERS)
def test_a_stop_waits_for_the_drain_and_the_end_of_the_replicas(name: str) -> None:
    found = re.fullmatch(r"\$\{STOP_GRACE_PERIOD:-(\d+)s\}", SERVICES[name]["stop_grace_period"])
    assert found
    settings = Settings()
    assert int(found[1]) > settings.drain_seconds + settings.terminate_seconds + SHUTDOWN_SECONDS_MAX


def test_the_gpu_image_has_the_extra_and_checks_what_the_transport_imports() -> None:
    (stage,) = [part for part in stages((DOCKER / "engine.Dockerfile").read_text()) if " AS gpu\n" in part]
    assert '"${wheel}[gpu]"' in stage
    (imported,) = re.findall(
        r"(?m)^from cuda\.bindings import (.+)$", (REPOSITORY / "transport/backends/cuda_ipc.py").read_text()
    )
    assert f"from cuda.bindings import {imported}" in stage


def test_no_secret_is_written_into_the_files() -> None:
    for variable in ("PEERKV_ADMIN_KEY", "PEERKV_TENANTS"):
        assert environment("gateway")[variable] == f"${{{variable}:-}}"
        assert not any(variable in environment(engine) for engine in ("engine-cpu", "engine-gpu"))
    for file in DOCKERFILES:
        assert "KEY=" not in (DOCKER / file).read_text()


def test_every_volume_is_declared() -> None:
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert used == set(COMPOSE["volumes"])


def stages(text: str) -> list[str]:
    return [part for part in re.split(r"(?m)^(?=FROM )", text) if part.startswith("FROM ")]


@pytest.mark.parametrize("file", DOCKERFILES)
def test_base_images_are_pinned_and_the_user_is_not_root(file: str) -> None:
    text = (DOCKER / file).read_text()
    for image in re.findall(r"(?m)^ARG \w+_IMAGE=(\S+)$", text):
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*", image), image
    finals = [stage for stage in stages(text) if "ENTRYPOINT" in stage]
    assert finals
    for stage in finals:
        assert "USER 10001:10001" in stage
        assert "--uid 10001" in stage
        assert "HEALTHCHECK" in stage
        assert not re.search(r"apt-get install .*(gcc|build-essential|git)", stage)
        entrypoint = json.loads(re.findall(r"(?m)^ENTRYPOINT (.*)$", stage)[-1])
        command = json.loads(re.findall(r"(?m)^CMD (.*)$", stage)[-1])
        assert entrypoint == ["peerkv"]
        assert callable(build_parser().parse_args(command).run)


@pytest.mark.parametrize("name", SERVICES)
def test_each_build_names_files_and_targets_that_exist(name: str) -> None:
    build = SERVICES[name]["build"]
    file = (DOCKER / build["context"] / build["dockerfile"]).resolve()
    assert file.parent == DOCKER
    if "target" in build:
        assert re.search(rf"(?m)^FROM .* AS {build['target']}$", file.read_text())


@pytest.mark.parametrize("file", DOCKERFILES)
def test_what_is_copied_is_in_the_build_context(file: str) -> None:
    allowed = {line[1:].rstrip("/") for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for words in re.findall(r"(?m)^COPY (?!--)(.*)$", (DOCKER / file).read_text()):
        for source in words.split()[:-1]:
            assert source == "." or source in allowed
    assert all((REPOSITORY / name).exists() for name in allowed)
    packages = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {"pyproject.toml", "README.md", "LICENSE", *(name.rstrip("*") for name in packages)} <= allowed


def test_the_cpu_image_installs_the_same_torch_as_make_install() -> None:
    torch = re.search(r'TORCH_CPU="(.+?)"', (REPOSITORY / "install.sh").read_text())
    assert torch
    assert torch[1] in (DOCKER / "engine.Dockerfile").read_text()


def test_the_requirements_script_prints_dependencies_and_extras() -> None:
    command = [sys.executable, str(DOCKER / "requirements.py"), str(REPOSITORY / "pyproject.toml"), "cpu"]
    lines = subprocess.check_output(command, text=True).splitlines()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert lines == project["dependencies"] + project["optional-dependencies"]["cpu"]


HEALTH = runpy.run_path(str(DOCKER / "healthcheck.py"))


def test_the_engine_host_is_healthy_when_a_replica_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_RUN_DIR", str(tmp_path))
    assert "fleet.json" in HEALTH["engine"]()
    for state, healthy in ((ReplicaState.STARTING, False), (ReplicaState.READY, True), (ReplicaState.BACKOFF, False)):
        replica = Replica("replica-0", state, "s", 1, 0, "", "cpu", "l")
        write_fleet(tmp_path, FleetSnapshot(1, "m", "m", "t", (replica,)))
        assert (HEALTH["engine"]() == "") is healthy


@pytest.fixture
def ready_status() -> Iterator[tuple[int, list[int]]]:
    """A server whose every answer has the status in the list."""
    status = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0] if self.path == "/ready" else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port, status
        server.shutdown()
        thread.join()


def test_the_gateway_is_healthy_when_it_is_ready(ready_status: tuple[int, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    port, status = ready_status
    monkeypatch.setenv("PEERKV_PORT", str(port))
    assert HEALTH["gateway"]() == ""
    status[0] = 503
    assert "503" in HEALTH["gateway"]()
