"""Real vLLM replicas for a comparison, each on a unix socket and a TCP port, and the figures of their own counters."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench.child_process import Started
from bench.machine import held_port
from bench.tcp_beside_unix import PORTS
from engine.fleet import FileFleet, ReplicaState

START_SECONDS_MAX = 600.0
RESET_SECONDS_MAX = 30.0
SOURCES = {"local_compute": "computed", "local_cache_hit": "local", "external_kv_transfer": "peer"}
_BY_SOURCE = "vllm:prompt_tokens_by_source_total{"
_PLAIN = {"vllm:num_preemptions_total{": "preemptions", "vllm:generation_tokens_total{": "generated"}


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens by an engine's own counters: prompt tokens by where their KV came from, and generated tokens."""

    computed: int = 0
    local: int = 0
    peer: int = 0
    generated: int = 0
    preemptions: int = 0

    def since(self, before: Counts) -> Counts:
        """Return what was added since `before`."""
        return Counts(*(getattr(self, name) - getattr(before, name) for name in self.__dataclass_fields__))

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def parse_counts(metrics: str) -> Counts:
    """Parse the counts from the text of vLLM's /metrics."""
    found = dict.fromkeys(Counts.__dataclass_fields__, 0)
    for line in metrics.splitlines():
        if line.startswith(_BY_SOURCE):
            source = line.partition('source="')[2].partition('"')[0]
            found[SOURCES[source]] += int(float(line.rpartition(" ")[2]))
        for prefix, name in _PLAIN.items():
            if line.startswith(prefix):
                found[name] += int(float(line.rpartition(" ")[2]))
    return Counts(**found)


class Engines:
    """`peerkv engine` with replicas that `launcher`, bench.tcp_beside_unix or what runs it, starts. `vllm_args` go to each
    server, `flags` to `peerkv engine`."""

    def __init__(
        self,
        directory: Path,
        model: str,
        vllm_args: Sequence[str],
        served_model_name: str,
        *,
        replicas: int = 2,
        flags: Sequence[str] = (),
        launcher: str = "bench.tcp_beside_unix",
        env: Mapping[str, str] = {},
    ) -> None:
        self.run_dir = directory / "run"
        self.table_dir = Path(f"/dev/shm/peerkv-field-{os.getpid()}")
        self.model = served_model_name
        names = tuple(f"replica-{number}" for number in range(replicas))
        self._held = {name: held_port() for name in names}  # an engine takes minutes until it binds its own
        self.ports: Mapping[str, int] = {name: held.getsockname()[1] for name, held in self._held.items()}
        self.urls = tuple(f"http://127.0.0.1:{port}" for port in self.ports.values())
        settings = directory / "engine.toml"
        settings.write_text(f"launcher = {json.dumps([sys.executable, '-m', launcher])}\nstart_failures_max = 1\n")
        argv = [sys.executable, "-m", "gateway.cli", "engine", model, "--replicas", str(len(names)), "--config", str(settings)]
        argv += ["--served-model-name", served_model_name, "--run-dir", str(self.run_dir)]
        argv += ["--table-dir", str(self.table_dir), "--log-dir", str(directory / "logs"), "--host-memory", "0", *flags]
        self._logs = directory / "logs"
        self._process = Started([*argv, "--", *vllm_args], directory / "engine.log", {PORTS: json.dumps(self.ports), **env})

    def wait(self) -> None:
        """Wait until all are serving. Raises StartFailed."""
        deadline = time.monotonic() + START_SECONDS_MAX
        for url in self.urls:
            while not self._serves(url):
                self._process.check(time.monotonic() < deadline and not self._given_up(), self._tails())
                time.sleep(0.2)

    def _serves(self, url: str) -> bool:
        try:
            return httpx.get(f"{url}/health", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    def _given_up(self) -> bool:
        return any(replica.state is ReplicaState.FAILED for replica in FileFleet(self.run_dir).snapshot().replicas)

    def _tails(self) -> str:
        return "".join(f"\n{path.name}: …{path.read_text(errors='replace')[-1500:]}" for path in self._logs.glob("*.log"))

    def counts(self) -> Counts:
        """Return the engines' counts so far, added up."""
        total = Counts()
        for url in self.urls:
            total += parse_counts(httpx.get(f"{url}/metrics", timeout=RESET_SECONDS_MAX).raise_for_status().text)
        return total

    def forget(self) -> None:
        """Empty all prefix caches, and host memory. Raises httpx.HTTPStatusError."""
        for url in self.urls:
            answer = httpx.post(f"{url}/reset_prefix_cache", params={"reset_external": "true"}, timeout=RESET_SECONDS_MAX)
            answer.raise_for_status()

    def end(self) -> None:
        """Stop the replicas."""
        self._process.end()
        for held in self._held.values():
            held.close()
