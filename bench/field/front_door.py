"""Waiting until what stands in front of the replicas serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import httpx

from bench.child_process import Started

START_SECONDS_MAX = 60.0


def wait_until_peerkv_serves(process: Started, url: str, replicas: int) -> None:
    """Wait for a gateway that knows all replicas, and that their token ids are its own. Raises StartFailed."""

    def serves() -> bool:
        stats = httpx.get(f"{url}/kv/stats", timeout=START_SECONDS_MAX).json()
        known = "unknown" not in (stats["parity"]["completions"]["parity"], stats["parity"]["chat"]["parity"])
        return bool(known and stats["totals"]["ready"] == replicas)

    _wait(process, serves)


def wait_until_router_serves(process: Started, url: str, model: str, extra: Mapping[str, object]) -> None:
    """Wait for a router that passes a request on, with `extra` fields in its body. Raises StartFailed."""

    def serves() -> bool:
        body = {"model": model, "prompt": "ready", "max_tokens": 1} | dict(extra)
        return httpx.post(f"{url}/v1/completions", json=body, timeout=START_SECONDS_MAX).status_code == 200

    _wait(process, serves)


def _wait(process: Started, serves: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        try:
            if serves():
                return
        except (httpx.HTTPError, ValueError, KeyError):
            pass
        process.check(time.monotonic() < deadline)
        time.sleep(0.1)
