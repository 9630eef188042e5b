"""More gateways before the replicas of a fleet."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.real.fleet import ANSWER_SECONDS_MAX, RESTART_SECONDS_MAX, ROOT, Fleet, free_port, until

END_SECONDS_MAX = 30.0


@dataclass
class Gateway:
    """One that runs. `client` makes a connection for each request, so that gateways on one port all get some."""

    client: httpx.Client
    process: subprocess.Popen[bytes]

    def stats(self) -> dict[str, Any]:
        """/kv/stats."""
        stats: dict[str, Any] = self.client.get("/kv/stats").raise_for_status().json()
        return stats


@contextmanager
def another_gateway(
    fleet: Fleet, directory: Path, config: str, port: int = 0, run_dir: Path | None = None
) -> Iterator[Gateway]:
    """A gateway with `config` as its settings' TOML, once it has compared its token ids with the engines'.

    It reads which replicas there are from `run_dir`, the fleet's own one if it is None.
    """
    directory.mkdir(exist_ok=True)
    (directory / "peerkv.toml").write_text(config)
    port = port or free_port()
    command = [sys.executable, "-m", "gateway.cli", "gateway", "--port", str(port), "--config", str(directory / "peerkv.toml")]
    command += ["--run-dir", str(run_dir or fleet.run_dir)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PEERKV_")}
    log = directory / "gateway.log"
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    limits = httpx.Limits(max_keepalive_connections=0)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_SECONDS_MAX, limits=limits) as client:
            gateway = Gateway(client, process)

            def compared() -> bool:
                assert process.poll() is None, log.read_text()
                try:
                    stats = gateway.stats()  # an older one on the same port may answer
                    is_this = stats["gateway"]["uptime_seconds"] < time.monotonic() - began
                    return is_this and stats["parity"]["chat"]["parity"] != "unknown"
                except (httpx.HTTPError, KeyError, ValueError):
                    return False

            until(compared, RESTART_SECONDS_MAX, "another gateway has compared its token ids")
            yield gateway
    finally:
        process.terminate()
        process.wait(END_SECONDS_MAX)
