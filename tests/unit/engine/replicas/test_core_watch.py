"""A core is judged by its steps and its CPU time, both seen from outside; a child process of the test stands in for it."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine.replicas.core_watch import GOES_ON, LOOK_SECONDS_MAX, CoreWatch, Standstill
from transport.table.deliveries import EngineLoad

BUSY = EngineLoad(running_requests=1)
SPIN = "while True: pass"
REST = "import time; time.sleep(600)"


@dataclass
class Table:
    pid: int
    step_ns: int = 1
    told: EngineLoad = field(default_factory=EngineLoad)

    def heartbeat_ns(self) -> int:
        return self.step_ns

    def load(self) -> EngineLoad:
        return self.told


@pytest.fixture
def resting() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-S", "-c", REST])
    yield process.pid
    process.kill()
    process.wait()


def looked(watch: CoreWatch, table: Table | None, now: float, pid: int = 0, *, overdue: bool = False) -> Standstill:
    return watch.look(pid, table, now, overdue=overdue)


def test_a_core_with_nothing_to_do_may_rest(resting: int) -> None:
    watch, table = CoreWatch(), Table(resting)
    assert [looked(watch, table, now) for now in (10.0, 12.0, 100.0)] == [GOES_ON] * 3


def test_without_a_descriptor_to_look_with_nothing_is_said_of_a_core(resting: int) -> None:
    watch, table = CoreWatch(), Table(resting, told=BUSY)
    looked(watch, table, 10.0)
    looked(watch, table, 12.0)  # by now it is done with starting
    before = looked(watch, table, 14.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(least_free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (least_free, hard))
    try:
        assert looked(watch, table, 16.0) == before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert looked(watch, table, 18.0).frozen_seconds == before.frozen_seconds + 4.0


def test_a_core_that_has_requests_and_does_nothing_stands_still(resting: int) -> None:
    watch, table = CoreWatch(), Table(resting, told=BUSY)
    looked(watch, table, 10.0)
    looked(watch, table, 12.0)  # by now it is done with starting
    before = looked(watch, table, 14.0)
    assert looked(watch, table, 16.0).frozen_seconds == before.frozen_seconds + 2.0
    table.step_ns += 1
    assert looked(watch, table, 18.0) == GOES_ON


def test_requests_that_never_reached_a_core_show_by_being_overdue(resting: int) -> None:
    watch, table = CoreWatch(), Table(resting)
    looked(watch, table, 10.0)
    assert looked(watch, table, 12.0, overdue=True).silent_seconds == 2.0


def test_a_pause_of_the_whole_machine_counts_for_little(resting: int) -> None:
    watch, table = CoreWatch(), Table(resting, told=BUSY)
    looked(watch, table, 10.0)
    assert looked(watch, table, 4000.0).silent_seconds == LOOK_SECONDS_MAX


def test_a_core_that_computes_a_long_step_is_silent_and_not_frozen() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", SPIN])
    try:
        watch, table = CoreWatch(), Table(process.pid, told=BUSY)
        looked(watch, table, 10.0)
        while int(Path(f"/proc/{process.pid}/stat").read_text().split()[13]) < 60:  # hundredths of a second
            os.sched_yield()
        assert looked(watch, table, 11.0) == Standstill(1.0, 0.0)
    finally:
        process.kill()
        process.wait()


def test_a_stopped_process_stands_still_whatever_is_known_of_it(resting: int) -> None:
    watch = CoreWatch()
    os.kill(resting, signal.SIGSTOP)
    os.waitid(os.P_PID, resting, os.WSTOPPED | os.WNOWAIT)
    looked(watch, None, 10.0, resting)
    looked(watch, None, 12.0, resting)
    assert looked(watch, None, 14.0, resting).frozen_seconds >= 2.0
