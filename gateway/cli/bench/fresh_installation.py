"""An installation started just for a measurement: `peerkv serve` on a free port, stopped afterwards."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from gateway.cli.bench.installation import NotMeasured

START_SECONDS_MAX = 900.0
STOP_SECONDS_MAX = 60.0
POLL_SECONDS = 0.2
LOG_CHARS_SHOWN = 2000


class StartedInstallation:
    """Runs inside its `with` block. `model` is as for `peerkv serve`, empty for the default one."""

    def __init__(self, model: str, vllm_args: Sequence[str] = ()) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="peerkv-bench-"))
        self.run_dir = self._home / "run"
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        argv = [sys.executable, "-m", "gateway.cli", "serve", *([model] if model else []), "--port", str(port)]
        argv += ["--run-dir", str(self.run_dir), "--log-dir", str(self._home / "logs")]
        self._argv = [*argv, *(["--", *vllm_args] if vllm_args else [])]
        self._log = self._home / "peerkv.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it and wait until all replicas are ready and token ids have been compared. Raises NotMeasured."""
        # Its own session: Ctrl-C stops the measurement, which then stops the installation.
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            deadline = time.monotonic() + START_SECONDS_MAX
            while not self._ready():
                if self._process.poll() is not None:
                    raise NotMeasured(f"the installation did not start:\n{self._tail()}")
                if time.monotonic() > deadline:
                    raise NotMeasured(f"the installation was not ready within {START_SECONDS_MAX:g} s:\n{self._tail()}")
                time.sleep(POLL_SECONDS)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _ready(self) -> bool:
        try:
            ready: dict[str, Any] = self._get("/ready").json()
            if not ready["ready"] or not all(replica["ready"] for replica in ready["replicas"]):
                return False
            stats: dict[str, Any] = self._get("/kv/stats").json()
        except (httpx.HTTPError, json.JSONDecodeError):
            return False
        return bool(stats["parity"]["completions"]["parity"] != "unknown")

    def _get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=POLL_SECONDS * 10, trust_env=False)  # no proxy: it is on this machine

    def _tail(self) -> str:
        paths = [self._log, *sorted((self._home / "logs").glob("*.log"))]
        return "\n".join(path.read_text(errors="replace")[-LOG_CHARS_SHOWN:] for path in paths)

    def _end(self) -> None:
        assert self._process is not None
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                os.kill(self._process.pid, number)
                try:
                    self._process.wait(STOP_SECONDS_MAX)
                except subprocess.TimeoutExpired:
                    continue
        shutil.rmtree(self._home, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
