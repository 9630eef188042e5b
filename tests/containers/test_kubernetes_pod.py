"""The pod of the manifests, its two containers run by podman as Kubernetes would run them: the same environment and mounts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.containers.stack import ANSWER_SECONDS_MAX, PROJECT, START_SECONDS_MAX, Stack, podman, until
from tests.real.fleet import free_port

NAMES = {"engine": "peerkv-pod-engine", "gateway": "peerkv-pod-gateway"}
RUN_VOLUME, LOG_VOLUME = "peerkv-pod-run", "peerkv-pod-logs"
# What Kubernetes sets for the services of the manifests, if a pod asks for it.
SERVICES = {
    "PEERKV_SERVICE_HOST": "10.0.0.1",
    "PEERKV_SERVICE_PORT": "8000",
    "PEERKV_SERVICE_PORT_HTTP": "8000",
    "PEERKV_PORT": "tcp://10.0.0.1:8000",
    "PEERKV_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "PEERKV_PORT_8000_TCP_PROTO": "tcp",
    "PEERKV_PORT_8000_TCP_PORT": "8000",
    "PEERKV_PORT_8000_TCP_ADDR": "10.0.0.1",
}


def containers(clone: Path) -> dict[str, dict[str, Any]]:
    manifest = yaml.safe_load((clone / "docker/kubernetes/base/statefulset.yaml").read_text())
    pod = manifest["spec"]["template"]["spec"]
    return {each["name"]: each for each in (*pod["initContainers"], *pod["containers"])}


def start(container: dict[str, Any], image: str, config: Path, *more: str) -> None:
    environment = {each["name"]: each["value"] for each in container["env"]} | SERVICES
    arguments = ["run", "--detach", "--name", NAMES[container["name"]], "--user", "10001:10001", "--read-only"]
    arguments += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp", "--shm-size", "2g"]
    arguments += [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
    volumes = (f"{RUN_VOLUME}:/run/peerkv", f"{LOG_VOLUME}:/var/log/peerkv", f"{config}:/etc/peerkv/peerkv.toml:ro")
    arguments += [word for volume in volumes for word in ("--volume", volume)]
    podman(*arguments, *more, image, *container["args"])


@pytest.fixture
def pod(clone: Path, stack: Stack) -> Iterator[str]:
    """The address of the pod's gateway."""
    stack.down()  # two fleets at one time are too much for a small machine
    models = f"{PROJECT}_models"
    made, port = containers(clone), free_port()
    config = clone / "docker/kubernetes/base/peerkv.toml"
    # Stand in for emptyDirs: everybody may write to its own directory.
    options = "nr_blocks=262144,mode=2777,uid=0,gid=10001"
    for volume in (RUN_VOLUME, LOG_VOLUME):
        podman("volume", "create", "--opt", "type=tmpfs", "--opt", "device=tmpfs", "--opt", f"o={options}", volume)
    try:
        start(made["engine"], "peerkv-engine:0.1.0-cpu", config, "--volume", f"{models}:/models")
        published = f"127.0.0.1:{port}:8000"
        made["gateway"]["env"] = [*made["gateway"]["env"], {"name": "PEERKV_ALLOW_ANYONE", "value": "true"}]
        start(made["gateway"], "peerkv-gateway:0.1.0", config, "--volume", f"{models}:/models:ro", "--publish", published)
        yield f"http://127.0.0.1:{port}"
    finally:
        for name in NAMES.values():
            podman("rm", "--force", "--time", "30", name, check=False)
        podman("volume", "rm", RUN_VOLUME, LOG_VOLUME, check=False)


def is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_the_pods_containers_start_with_what_kubernetes_gives_them(pod: str) -> None:
    try:
        until(lambda: is_ready(pod), START_SECONDS_MAX, "the pod's gateway is ready")
    except AssertionError:
        logs = [podman("logs", "--tail", "30", name, check=False) for name in NAMES.values()]
        raise AssertionError("\n".join(logs)) from None
    model = httpx.get(f"{pod}/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 4}
    assert httpx.post(f"{pod}/v1/completions", json=body, timeout=ANSWER_SECONDS_MAX).status_code == 200
