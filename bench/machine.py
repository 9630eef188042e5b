"""Processes of a measurement: the core they run on, the CPU time they used, and stopping them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PROXY_CORE = 0
LOAD_CORE = 1
END_SECONDS_MAX = 5.0
_CPUCLOCK_SCHED = 2


class StartFailed(Exception):
    """A process did not come up; the message has the end of its log."""


class Pinned:
    """A process and its children on one core, or a list of them, in its own session. Its output goes to `log`."""

    def __init__(self, argv: Sequence[str], core: int | str, log: Path, env: Mapping[str, str]) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                ["taskset", "-c", str(core), *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **env},
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise StartFailed if it ended."""
        if self._process.poll() is not None:
            raise StartFailed(f"it ended; {self.tail()}")

    def tail(self) -> str:
        """Return the end of its log."""
        return f"its log: {self.log.read_text(errors='replace')[-2000:]}"

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its processes and threads so far, user and system."""
        return sum(cpu_seconds(pid) for pid in _tree(self._process.pid))

    def resident_bytes(self) -> int:
        """Return the resident memory of all its processes."""
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in _tree(self._process.pid)]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def end(self) -> None:
        """Stop it and all its children."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                os.killpg(self._process.pid, number)
                try:
                    self._process.wait(END_SECONDS_MAX)
                except subprocess.TimeoutExpired:
                    continue
        self._process.wait()


def _tree(root: int) -> list[int]:
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        for task in Path(f"/proc/{pid}/task").iterdir():
            waiting.extend(int(child) for child in (task / "children").read_text().split())
    return found


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of one process and its threads so far, user and system."""
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)  # the CPU-time clock of a process, as clock_getcpuclockid makes it


def free_ports(count: int) -> list[int]:
    """Return ports that nobody is listening on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def held_port() -> socket.socket:
    """Return a bound socket: while it is open, only a process that asks for this very port with SO_REUSEADDR can get it."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def end_on_sigterm() -> None:
    """Make SIGTERM end this process like a normal exit does: together with everything it started."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
