"""Whether a replica's engine core goes on: its HTTP server answers /health however still the core stands."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.host_process import processes
from transport.table.deliveries import EngineLoad

BUSY_SHARE_MIN = 0.05
"""Of one processor: a core that computes, or waits for its GPU, uses more; its threads that look around use less."""
LOOK_SECONDS_MIN = 0.25
"""Of two looks that are closer the second says nothing: CPU time is counted in hundredths of a second."""
LOOK_SECONDS_MAX = 5.0
"""More is not counted between two looks: the whole machine may have stood still."""
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


class CoreTable(Protocol):
    """What is needed of the core's block table."""

    @property
    def pid(self) -> int: ...
    def heartbeat_ns(self) -> int: ...
    def load(self) -> EngineLoad: ...


@dataclass(frozen=True, slots=True)
class Standstill:
    """Seconds without a step although there is something to do, and those of them without CPU time either."""

    silent_seconds: float = 0.0
    frozen_seconds: float = 0.0


GOES_ON = Standstill()


class CoreWatch:
    """Compares a core with what it was at the last look."""

    def __init__(self) -> None:
        self._pid = 0
        self._step_ns = 0
        self._ticks = 0
        self._looked_at = 0.0
        self._standstill = GOES_ON

    def look(self, server_pid: int, table: CoreTable | None, now: float, *, overdue: bool) -> Standstill:
        """`overdue`: somebody waits for it far too long, which shows that it has something to do.

        Without a table the core is not known, and only a stopped process is seen.
        """
        elapsed = now - self._looked_at
        if elapsed < LOOK_SECONDS_MIN:
            return self._standstill
        pid = table.pid if table is not None else server_pid
        step_ns = table.heartbeat_ns() if table is not None else 0
        ticks, stopped = _activity(pid)
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
    """CPU ticks of a process and its children so far, and whether it was stopped (SIGSTOP, a debugger)."""
    ticks, stopped = 0, False
    for each in (pid, *processes.children(pid)):
        fields = _stat(each)
        if fields:
            ticks += int(fields[11]) + int(fields[12])
            stopped = stopped or (each == pid and fields[0] in "Tt")
    return ticks, stopped


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat after the name; none when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()
