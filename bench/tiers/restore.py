"""The first token of a prompt that is computed, held by its replica, or restored from disk or vault: real vLLM on this machine.

One replica with little memory and no other; a prompt is asked for twice, then evicted by others, written, and forgotten by all
memories, so that only disk or vault has it.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from bench.child_process import Started
from bench.machine import free_ports
from bench.tiers.stores import vault

START_SECONDS_MAX = 600.0
ASK_SECONDS_MAX = 600.0
SETTLE_SECONDS = 1.5
KV_BYTES = 256 << 20
WORDS = 20000


class Served:
    """`peerkv serve` with one replica and so many stores: disk, vault."""

    def __init__(
        self,
        directory: Path,
        model: str,
        flags: list[str],
        *,
        stores: int = 1,
        kv_bytes: int = KV_BYTES,
        dtype: str = "auto",
        vllm_args: Sequence[str] = (),
    ) -> None:
        (port,) = free_ports(1)
        self.run_dir = directory / "run"
        argv = [sys.executable, "-m", "gateway.cli", "serve", model, "--port", str(port), "--replicas", "1"]
        argv += ["--run-dir", str(self.run_dir), "--log-dir", str(directory / "logs")]
        self.table_dir = Path(f"/dev/shm/peerkv-bench-{os.getpid()}-{port}")
        argv += ["--table-dir", str(self.table_dir), "--tier-wait-seconds-max", "30", "--host-memory", "0", *flags]
        argv += ["--", "--kv-cache-memory-bytes", str(kv_bytes), "--dtype", dtype, *vllm_args]
        self._stores = ["ok"] * stores
        self._process = Started(argv, directory / "serve.log", {})
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=ASK_SECONDS_MAX)

    def wait(self) -> None:
        """Wait until it serves and its store is in use. Raises StartFailed."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while not self._ready():
            self._process.check(time.monotonic() < deadline)
            time.sleep(0.2)

    def _ready(self) -> bool:
        try:
            stats = self.client.get("/kv/stats").json()
            states = [store["state"] for store in stats["tiers"]["stores"]]
            return stats["parity"]["completions"]["parity"] == "exact" and states == self._stores
        except (httpx.TransportError, KeyError, ValueError):
            return False

    def seconds(self, ids: list[int]) -> tuple[float, dict[str, int]]:
        """Ask for one token; return the seconds to the whole answer, and how many prompt tokens came from where."""
        before, began = self._tokens(), time.perf_counter()
        model = self.client.get("/v1/models").json()["data"][0]["id"]
        began = time.perf_counter()
        answer = self.client.post("/v1/completions", json={"model": model, "prompt": ids, "max_tokens": 1})
        took = time.perf_counter() - began
        answer.raise_for_status()
        after = self._tokens()
        return took, {name: after[name] - before[name] for name in after}

    def _tokens(self) -> dict[str, int]:
        tokens: dict[str, int] = self.client.get("/kv/stats").json()["totals"]["tokens"]
        return tokens

    def settle(self) -> None:
        """Wait until all that went into host memory is written."""
        before: Any = None
        while self._stores and (now := self.client.get("/kv/stats").json()["tiers"]["stores"][0]["stored_frames"]) != before:
            before = now
            time.sleep(SETTLE_SECONDS)

    def forget(self) -> None:
        """Empty the replica's memories."""
        transport = httpx.HTTPTransport(uds=str(self.run_dir / "replica-0.sock"))
        with httpx.Client(transport=transport, base_url="http://replica", timeout=ASK_SECONDS_MAX) as client:
            client.post("/reset_prefix_cache", params={"reset_external": "true"}).raise_for_status()

    @property
    def pid(self) -> int:
        """The process that everything else is below."""
        return self._process.pid

    def end(self) -> None:
        """Stop it."""
        self.client.close()
        self._process.end()


def measure(served: Served, store: str, tokens: int, samples: int, prompts: Callable[[int], list[int]]) -> None:
    """Print a row."""
    cold, local, restored = [], [], []
    for _ in range(samples):
        ids = prompts(tokens)
        cold.append(_sure(served, ids, "computed"))
        local.append(_sure(served, ids, "local"))
        evicted = 0
        while evicted < KV_BYTES // _TOKEN_BYTES + tokens:
            served.seconds(prompts(4000))
            evicted += 4000
        served.settle()
        served.forget()
        restored.append(_sure(served, ids, store))
    cells = [f"{statistics.median(each):7.2f} ({min(each):.2f} to {max(each):.2f})" for each in (cold, local, restored)]
    print(f"{store:6} {tokens:6} {cells[0]:>24} {cells[1]:>24} {cells[2]:>24}", flush=True)


_TOKEN_BYTES = 46080
"""Of the default model in float32, as vLLM computes it on the CPU."""


def _sure(served: Served, ids: list[int], source: str) -> float:
    """Ask, and return the seconds, if most of the prompt came from `source`. Raises RuntimeError if not."""
    took, moved = served.seconds(ids)
    if moved[source] < 0.9 * len(ids):
        raise RuntimeError(f"of {len(ids)} tokens only {moved[source]} came from {source}: {moved}")
    return took


def run(model: str, lengths: list[int], samples: int, directory: Path | None) -> None:
    """Measure and print."""
    print(f"seconds to the answer of one token, median (least to most) of {samples}; load average {os.getloadavg()[0]:.1f}")
    print(f"{'store':6} {'tokens':>6} {'computed':>24} {'local hit':>24} {'restored':>24}", flush=True)
    numbers = random.Random(os.getpid())
    for store in ("disk", "vault"):
        with ExitStack() as stack:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peerkv-bench-tiers-", dir=directory)))
            flags = ["--disk", str(home / "disk")]
            if store == "vault":
                flags = ["--vault", f"valkey://127.0.0.1:{stack.enter_context(vault()).port}"]
            served = Served(home, model, ["--host-memory", "1GiB", *flags])
            stack.callback(served.end)
            served.wait()
            for tokens in lengths:
                measure(served, store, tokens, samples, lambda count: [numbers.randrange(1000, WORDS) for _ in range(count)])
