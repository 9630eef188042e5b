"""Whether a replica's engine core makes progress: its HTTP server answers /health even if the core is stuck."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.host_process import processes
from transport.table.deliveries import EngineLoad

BUSY_SHARE_MIN = 0.05
"""Share of one processor: a core that computes or waits for its GPU uses more; its polling threads use less."""
LOOK_SECONDS_MIN = 0.25
"""The second of two checks closer together says nothing: CPU time is counted in hundredths of a second."""
LOOK_SECONDS_MAX = 5.0
"""No more than this is counted between two checks: the whole machine may have been suspended."""
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


class CoreTable(Protocol):
    """The part of the core's block table that is needed here."""

    @property
    def pid(self) -> int: ...
    def heartbeat_ns(self) -> int: ...
    def load(self) -> EngineLoad: ...


@dataclass(frozen=True, slots=True)
class Standstill:
    """Seconds without a step although there is work, and how many of them also passed without CPU time."""

    silent_seconds: float = 0.0
    frozen_seconds: float = 0.0


GOES_ON = Standstill()


class CoreWatch:
    """Compares a core with its state at the last check."""

    def __init__(self) -> None:
        self._pid = 0
        self._step_ns = 0
        self._ticks = 0
        self._looked_at = 0.0
        self._standstill = GOES_ON

    def look(self, server_pid: int, table: CoreTable | None, now: float, *, overdue: bool) -> Standstill:
        """`overdue`: somebody has been waiting for it far too long, which shows that it has work.

        Without a table the core is unknown, and only a stopped process is noticed. What could not be looked at stays as it was.
        """
        elapsed = now - self._looked_at
        if elapsed < LOOK_SECONDS_MIN:
            return self._standstill
        pid = table.pid if table is not None else server_pid
        step_ns = table.heartbeat_ns() if table is not None else 0
        try:
            ticks, stopped = _activity(pid)
        except OSError:  # of ours, such as no descriptor left: it says nothing about the core
            return self._standstill
        computes = ticks - self._ticks > BUSY_SHARE_MIN * elapsed * _TICKS_A_SECOND
        moves = step_ns != self._step_ns or pid != self._pid
        self._pid, self._step_ns, self._ticks, self._looked_at = pid, step_ns, ticks, now
        waited_for = table is not None and (overdue or _has_work(table.load()))
        if moves or not (waited_for or stopped):
            self._standstill = GOES_ON
            return GOES_ON
        passed, before = min(elapsed, LOOK_SECONDS_MAX), self._standstill
        frozen = 0.0 if computes else before.frozen_seconds + passed
        self._standstill = Standstill(before.silent_seconds + passed, frozen)
        return self._standstill


def _has_work(load: EngineLoad) -> bool:
    return bool(load.waiting_requests or load.running_requests)


def _activity(pid: int) -> tuple[int, bool]:
    """Return the CPU ticks of a process and its children so far, and whether it is stopped (SIGSTOP, a debugger).

    Raises OSError if /proc cannot be read.
    """
    ticks, stopped = 0, False
    for each in (pid, *processes.children(pid)):
        fields = _stat(each)
        if fields:
            ticks += int(fields[11]) + int(fields[12])
            stopped = stopped or (each == pid and fields[0] in "Tt")
    return ticks, stopped


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat after the name; none if it is gone. Raises OSError."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text[text.rindex(")") + 2 :].split()
