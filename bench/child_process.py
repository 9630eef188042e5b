"""A process that a measurement starts in its own session and stops at the end."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.machine import StartFailed

LOG_CHARS_SHOWN = 2000


class Started:
    """Runs as soon as it is created; its output goes to `log`. It does not inherit PEERKV_* variables."""

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str], end_seconds_max: float = 30.0) -> None:
        self._log, self._end_seconds_max = log, end_seconds_max
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PEERKV_")}
        path = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH"))))
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=kept | {"PYTHONPATH": path} | dict(env),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process itself."""
        return self._process.pid

    def check(self, in_time: bool, more: str = "") -> None:
        """Raise StartFailed if it ended or is not `in_time`; `more` is added to the message."""
        ended = self._process.poll() is not None
        if ended or not in_time:
            tail = self._log.read_text(errors="replace")[-LOG_CHARS_SHOWN:]
            raise StartFailed(f"{'it ended' if ended else 'it did not become ready'}; its log: {tail}{more}")

    def kill(self) -> None:
        """Kill it and its session at once, as a crash would."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def end(self) -> None:
        """Stop it, by force if necessary."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                os.killpg(self._process.pid, number)
                try:
                    self._process.wait(self._end_seconds_max)
                except subprocess.TimeoutExpired:
                    continue
        self._process.wait()
