"""The containers of docker/compose.yaml, run by podman-compose from a clone of this repository."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.real.fleet import free_port

PROJECT = "peerkv-trial"
# podman-compose does not know services that need not be there (`required: false`).
UNKNOWN_TO_PODMAN = "      engine-gpu: {condition: service_started, required: false}\n"
START_SECONDS_MAX = 420.0  # the first start fetches and converts the model
BACK_SECONDS_MAX = 240.0
ANSWER_SECONDS_MAX = 120.0
COMMAND_SECONDS_MAX = 300.0
LOG_LINES_SHOWN = 40
# All but Grafana, of which there is no package to make an image from.
SERVICES = ("engine-cpu", "gateway", "prometheus")
ADDRESS = "127.0.0.2"  # one that compose.yaml would not take by itself
MODEL = "trial-model"
KEYS_FILE = "/var/lib/peerkv/keys.toml"
CONFIG = f'served_model_name = "{MODEL}"\nbackoff_seconds_max = 2.0\n'


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait for `condition` to be true, and return what it gave. Raises AssertionError that names `what`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.25)
    return found


def run(*command: str, check: bool = True, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with its output as text."""
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=COMMAND_SECONDS_MAX, check=False)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def podman(*arguments: str, check: bool = True) -> str:
    """The output of a podman command."""
    done = run("podman", *arguments, check=check)
    return (done.stdout + done.stderr).strip()


class Stack:
    """One project of compose. `clone` is the repository, `home` a directory for keys and settings of this trial."""

    def __init__(self, clone: Path, home: Path, profiles: tuple[str, ...] = ("cpu", "observability")) -> None:
        self.file = clone / "docker" / "compose.podman.yaml"
        text = (clone / "docker" / "compose.yaml").read_text()
        assert UNKNOWN_TO_PODMAN in text
        self.file.write_text(text.replace(UNKNOWN_TO_PODMAN, ""))
        self.key = secrets.token_hex(16)
        self.port, self.prometheus_port = free_port(), free_port()
        self.url = f"http://{ADDRESS}:{self.port}"
        (home / "admin_key").write_text(self.key + "\n")
        (home / "peerkv.toml").write_text(CONFIG)
        home.chmod(0o700)
        for name in ("admin_key", "peerkv.toml"):
            (home / name).chmod(0o444)
        self.env = {
            **os.environ,
            "COMPOSE_PROFILES": ",".join(profiles),
            "BIND_ADDRESS": ADDRESS,
            "HOST_PORT": str(self.port),
            "PROMETHEUS_PORT": str(self.prometheus_port),
            "ADMIN_KEY_FILE": str(home / "admin_key"),
            "CONFIG_FILE": str(home / "peerkv.toml"),
            "PEERKV_ACCESS_LOG": "true",
            "PEERKV_HOST_MEMORY": "128MiB",
            "PEERKV_DISK": "/var/cache/peerkv",
            "PEERKV_DISK_BYTES": "1GiB",
            "PEERKV_KEYS_FILE": KEYS_FILE,
        }
        self.client = httpx.Client(base_url=self.url, timeout=ANSWER_SECONDS_MAX)
        self.admin = {"authorization": f"Bearer {self.key}"}

    # Its life

    def compose(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command of compose."""
        program = str(Path(sys.executable).with_name("podman-compose"))
        return run(program, "--in-pod=false", "-p", PROJECT, "-f", str(self.file), *arguments, check=check, env=self.env)

    def add_key(self, name: str, *limits: str) -> str:
        """Make an API key in the volume that the gateway reads them from; return it. That may have one of another run."""
        own = f"{name}-{secrets.token_hex(3)}"
        made = self.compose("run", "--rm", "--no-deps", "gateway", "keys", "add", own, "--tenant", name, "--json", *limits)
        return str(json.loads(made.stdout[made.stdout.index("{") :])["key"])

    def up(self, *services: str) -> None:
        """Start the containers, or those of some services; does not wait until they serve."""
        self.compose("up", "-d", "--no-build", *(services or SERVICES))

    def down(self) -> None:
        """Stop and remove the containers; volumes stay.

        The gateway first, as Compose does by `depends_on`: podman-compose stops all of them at once.
        """
        self.compose("stop", "gateway", check=False)  # it may be down already
        self.compose("down")

    def wait_ready(self, seconds: float = BACK_SECONDS_MAX) -> None:
        """Wait until both replicas serve and their token ids were compared."""
        until(self.is_ready, seconds, "both replicas are ready")

    def is_ready(self) -> bool:
        """Whether both replicas serve, exchange, and the gateway knows their token ids."""
        try:
            ready = self.client.get("/ready")
            if ready.status_code != 200 or sum(replica["ready"] for replica in ready.json()["replicas"]) != 2:
                return False
            stats = self.stats()
        except (httpx.TransportError, httpx.HTTPStatusError, KeyError, ValueError):
            return False
        exchange = all(replica["exchanges"] == "ok" for replica in stats["replicas"])
        return exchange and stats["parity"]["completions"]["parity"] != "unknown"

    # Looking into it

    def container(self, service: str) -> str:
        """A container's name."""
        return f"{PROJECT}_{service}_1"

    def inspect(self, service: str) -> dict[str, Any]:
        """What podman knows of a container."""
        (found,) = json.loads(podman("inspect", self.container(service)))
        return dict(found)

    def execute(self, service: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command inside a container."""
        return run("podman", "exec", self.container(service), *command, check=check)

    def logs(self, service: str) -> str:
        """A container's last lines."""
        return podman("logs", "--tail", str(LOG_LINES_SHOWN), self.container(service), check=False)

    def stats(self) -> dict[str, Any]:
        """/kv/stats, with the admin key."""
        found: dict[str, Any] = self.client.get("/kv/stats", headers=self.admin).raise_for_status().json()
        return found

    # Asking it

    def complete(self, prompt: str, replica: str | None = None, **more: Any) -> httpx.Response:
        """A greedy completion, on `replica` if given."""
        headers = self.admin | ({"x-peerkv-replica": replica} if replica else {})
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
        return self.client.post("/v1/completions", json=body, headers=headers)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What Prometheus answers to an expression now."""
        url = f"http://127.0.0.1:{self.prometheus_port}/api/v1/query"
        answer = httpx.get(url, params={"query": expression}, timeout=ANSWER_SECONDS_MAX).raise_for_status().json()
        return list(answer["data"]["result"])


def long_prompt(words: int = 400) -> str:
    """Words that no prompt before had."""
    return " ".join(secrets.token_hex(3) for _ in range(words))
