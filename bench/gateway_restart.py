"""How soon a gateway that was killed answers again on warm replicas: `python -m bench.gateway_restart --model DIR`.

`peerkv engine` runs two real replicas for the whole measurement. `peerkv gateway` is started beside it, killed with SIGKILL
once it has answered a completion of one token, and started again. A time runs from the start of the process to the whole
answer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

from bench.child_process import Started
from bench.engines import Engines
from bench.machine import cpu_seconds, end_on_sigterm, free_ports

ANSWER_SECONDS_MAX = 60.0
POLL_SECONDS = 0.005
SERVED_NAME = "restarted"


def main() -> int:
    """Measure, and print each time and their median in seconds."""
    parser = argparse.ArgumentParser(prog="python -m bench.gateway_restart", description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="directory of the model")
    parser.add_argument("--times", type=int, default=7, metavar="N", help="how often the gateway is killed (default: 7)")
    given = parser.parse_args()
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="peerkv-restart-") as name:
        directory = Path(name)
        engines = Engines(directory, given.model, (), SERVED_NAME)
        try:
            engines.wait()
            _until_answered(directory, engines.run_dir)  # the first one fills the page cache and warms the replicas up
            seconds = []
            for _ in range(given.times):
                took, cpu = _until_answered(directory, engines.run_dir)
                seconds.append(took)
                print(f"{took:.2f} s, {cpu:.2f} s of CPU time", flush=True)
        finally:
            engines.end()
    print(f"median {statistics.median(seconds):.2f}, {min(seconds):.2f} to {max(seconds):.2f}")
    return 0


def _until_answered(directory: Path, run_dir: Path) -> tuple[float, float]:
    """Start a gateway, wait for its first answer, kill it; return the seconds in between, and those of CPU time.

    Raises StartFailed.
    """
    (port,) = free_ports(1)
    argv = [sys.executable, "-m", "gateway.cli", "gateway", "--port", str(port), "--run-dir", str(run_dir)]
    started_at = time.perf_counter()
    gateway = Started(argv, directory / "gateway.log", {})
    try:
        while not _answers(port):
            gateway.check(time.perf_counter() - started_at < ANSWER_SECONDS_MAX)
            time.sleep(POLL_SECONDS)
        return time.perf_counter() - started_at, cpu_seconds(gateway.pid)
    finally:
        gateway.kill()


def _answers(port: int) -> bool:
    body = {"model": SERVED_NAME, "prompt": "The capital of France is", "max_tokens": 1}
    try:
        return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=ANSWER_SECONDS_MAX).is_success
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    sys.exit(main())
