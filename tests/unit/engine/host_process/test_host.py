import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.host_process import processes
from engine.host_process.directories import claim_all
from engine.host_process.kept_memory import KeptMemory, decode_kept
from engine.host_process.messages import (
    Command,
    Event,
    Exited,
    Hello,
    Kill,
    Quit,
    Spawn,
    Spawned,
    Terminate,
    decode_event,
    encode_line,
)
from transport.backends.shared_memory import open_region
from transport.errors import MemoryUnreachable

DEADLINE_SECONDS = 20.0


def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`, DEADLINE_SECONDS at most."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether `pid` runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"


class RunningHost:
    """A host process with claimed directories, as the supervisor starts it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.run_dir, self.table_dir = home / "run", home / "table"
        claims = claim_all([self.run_dir, self.table_dir], 0)
        held = [c.lock_fd for c in claims]
        command = [sys.executable, "-m", "engine.host_process", "--hold", *map(str, held)]
        command += ["--run-dir", str(self.run_dir), "--table-dir", str(self.table_dir)]
        with (home / "host.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, pass_fds=held)
        for fd in held:
            os.close(fd)
        assert self.next() == Hello(self.process.pid)

    def tell(self, command: Command) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(encode_line(command))
        self.process.stdin.flush()

    def next(self) -> Event:
        assert self.process.stdout is not None
        return decode_event(self.process.stdout.readline())

    def spawn(self, script: str, name: str = "r", log_bytes_max: int = 1 << 20) -> int:
        """Start a shell script as a replica; its files lie in `home`. Returns its process id."""
        socket, scratch = str(self.run_dir / f"{name}.sock"), str(self.run_dir / f"ipc-{name}")
        env = {"HOME": str(self.home), "PATH": os.environ["PATH"], "SOCKET": socket, "SCRATCH": scratch}
        argv = ("sh", "-c", f"cd; {script}")
        self.tell(Spawn(name, argv, env, socket, scratch, str(self.home / f"{name}.log"), log_bytes_max))
        event = self.next()
        assert isinstance(event, Spawned)
        return event.pid

    def wait_file(self, name: str) -> str:
        path = self.home / name
        until(lambda: path.exists() and path.read_text().endswith("\n"))
        return path.read_text().strip()

    def hang_up(self) -> int:
        """What the supervisor's death does. Returns the host's exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(DEADLINE_SECONDS)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RunningHost]:
    running = RunningHost(tmp_path)
    yield running
    with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
        running.hang_up()  # a killed host would leave the children of its replicas behind
    running.process.kill()
    running.process.wait()
    for pipe in (running.process.stdin, running.process.stdout):
        with contextlib.suppress(BrokenPipeError):
            if pipe is not None:
                pipe.close()


def test_a_replica_leads_a_session_and_inherits_nothing(host: RunningHost) -> None:
    pid = host.spawn("ls -l /proc/$$/fd > fds.new; mv fds.new fds; echo $SOCKET; exec sleep 600")
    assert os.getsid(pid) == os.getpgid(pid) == pid
    open_files = host.wait_file("fds")
    assert "/dev/null" in open_files
    assert "pipe:" not in open_files
    assert "peerkv-owned" not in open_files
    until(lambda: (host.home / "r.log").read_text() == f"{host.run_dir}/r.sock\n")


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", -9)])
def test_an_ended_replica_is_reported_with_its_status(host: RunningHost, script: str, code: int) -> None:
    pid = host.spawn(script)
    assert host.next() == Exited("r", pid, code)


def test_a_program_that_cannot_be_run_is_an_exit_with_a_reason(host: RunningHost) -> None:
    host.tell(Spawn("r", ("/no/such/program",), {}, "/s", str(host.home / "i"), str(host.home / "r.log"), 1))
    pid = host.next()
    assert isinstance(pid, Spawned)
    assert host.next() == Exited("r", pid.pid, 127)
    assert "cannot run /no/such/program: No such file" in (host.home / "r.log").read_text()


def test_what_a_replica_started_ends_with_it(host: RunningHost) -> None:
    pid = host.spawn("sleep 600 & echo $! > child; setsid sleep 600 & echo $! > escaped; wait")
    children = [int(host.wait_file("child")), int(host.wait_file("escaped"))]
    assert all(alive(child) for child in children)
    os.kill(pid, signal.SIGKILL)
    assert host.next() == Exited("r", pid, -9)
    until(lambda: not any(alive(child) for child in children))


def test_the_others_are_untouched_when_one_replica_ends(host: RunningHost) -> None:
    other = host.spawn("sleep 600 & echo $! > child; wait", "other")
    child = int(host.wait_file("child"))
    pid = host.spawn("exit 1")
    assert host.next() == Exited("r", pid, 1)
    assert alive(other)
    assert alive(child)


def test_an_ended_replica_leaves_no_socket_and_no_scratch(host: RunningHost) -> None:
    pid = host.spawn("touch $SOCKET $SCRATCH/x; echo > made; exec sleep 600")
    host.wait_file("made")
    os.kill(pid, signal.SIGKILL)
    assert host.next() == Exited("r", pid, -9)
    until(lambda: set(os.listdir(host.run_dir)) == {".peerkv-owned"})


def test_terminate_asks_and_kill_does_not(host: RunningHost) -> None:
    polite = host.spawn("trap 'exit 5' TERM; echo > armed; while :; do sleep 0.01; done")
    host.wait_file("armed")
    host.tell(Terminate("r"))
    assert host.next() == Exited("r", polite, 5)
    deaf = host.spawn("trap '' TERM; echo > deaf; sleep 600 & wait", "deaf")
    host.wait_file("deaf")
    host.tell(Terminate("deaf"))
    host.tell(Kill("deaf"))
    assert host.next() == Exited("deaf", deaf, -9)


def test_commands_for_unknown_replicas_are_ignored(host: RunningHost) -> None:
    host.tell(Terminate("nobody"))
    host.tell(Kill("nobody"))
    pid = host.spawn("exit 0")
    assert host.next() == Exited("r", pid, 0)


@pytest.mark.parametrize("how", ["quit", "hang up"])
def test_without_a_supervisor_nothing_is_left(host: RunningHost, how: str) -> None:
    pid = host.spawn("trap '' TERM HUP INT; setsid sleep 600 & sleep 600 & echo $! > child; touch $SOCKET; wait")
    child = int(host.wait_file("child"))
    (host.table_dir / "r.table").write_bytes(bytes(4096))
    if how == "quit":
        host.tell(Quit())
    assert host.hang_up() == 0
    assert not alive(pid)
    assert not alive(child)
    assert not host.run_dir.exists()
    assert not host.table_dir.exists()


def test_a_killed_host_takes_its_replicas_along(host: RunningHost) -> None:
    pid = host.spawn("trap '' TERM HUP INT; echo > up; while :; do sleep 1; done")
    host.wait_file("up")
    assert alive(pid)
    host.process.kill()
    until(lambda: not alive(pid))


def test_a_line_that_is_no_command_ends_the_host_but_not_the_directories(host: RunningHost) -> None:
    pid = host.spawn("exec sleep 600")
    assert host.process.stdin is not None
    host.process.stdin.write(b'{"op":"dance"}\n')
    host.process.stdin.flush()
    assert host.process.wait(DEADLINE_SECONDS) == 1
    assert not alive(pid)
    assert host.run_dir.exists()
    assert "dance" in (host.home / "host.log").read_text()


def test_an_interrupt_from_the_terminal_is_the_supervisors_business(host: RunningHost) -> None:
    pid = host.spawn("exec sleep 600")
    host.process.send_signal(signal.SIGINT)
    host.tell(Kill("r"))
    assert host.next() == Exited("r", pid, -9)


def test_a_terminated_host_ends_its_replicas_but_keeps_the_directories(host: RunningHost) -> None:
    pid = host.spawn("exec sleep 600")
    host.process.terminate()
    assert host.process.wait(DEADLINE_SECONDS) == 0
    assert not alive(pid)
    assert host.run_dir.exists()


def test_a_long_log_is_rotated_when_the_replica_starts(host: RunningHost) -> None:
    log = host.home / "r.log"
    log.write_text("old " * 100)
    host.spawn("echo new; exec sleep 600", log_bytes_max=100)
    until(lambda: log.exists() and log.read_text() == "new\n")
    assert (host.home / "r.log.1").read_text().startswith("old")


def test_a_log_is_kept_bounded_while_the_replica_runs(host: RunningHost) -> None:
    log, old = host.home / "r.log", host.home / "r.log.1"
    (host.home / "long").write_text("before\n" * 100)
    host.spawn("cat long; until [ -e go ]; do sleep 0.01; done; echo after; exec sleep 600", log_bytes_max=200)
    until(lambda: old.exists() and log.stat().st_size == 0)
    assert old.read_text() == "before\n" * 100
    (host.home / "go").touch()
    until(lambda: log.read_text() == "after\n")


def test_a_log_that_can_not_be_rotated_does_not_end_the_host(host: RunningHost) -> None:
    (host.home / "r.log.1").mkdir()
    pid = host.spawn("echo a line that is longer than the bound; until [ -e go ]; do sleep 0.01; done; exit 4", log_bytes_max=8)
    until(lambda: "cannot be rotated" in (host.home / "host.log").read_text())
    (host.home / "go").touch()
    assert host.next() == Exited("r", pid, 4)


def test_a_process_knows_its_children_and_its_session() -> None:
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        assert child.pid in processes.children(os.getpid())
        assert processes.session_members(child.pid) == (child.pid,)
    finally:
        child.kill()
        child.wait()
    assert processes.session_members(child.pid) == ()


def test_memory_kept_for_a_replica_outlives_it_and_ends_with_the_host(host: RunningHost) -> None:
    told = [keep(host), keep(host)]
    assert told[0].region == told[1].region
    assert told[0].draft != told[1].draft
    assert [each.new for each in told] == [True, False]
    fd = open_region(told[0].region, writable=True)
    assert os.fstat(fd).st_size == 4096
    os.close(fd)
    assert [path.name for path in host.table_dir.glob(".replica.*")] == [Path(told[1].draft).name]
    assert host.hang_up() == 0
    with pytest.raises(MemoryUnreachable):
        open_region(told[0].region)


def keep(host: RunningHost) -> KeptMemory:
    """Run a replica that 4096 bytes are kept for; returns what it was told."""
    socket, scratch = str(host.run_dir / "r.sock"), str(host.run_dir / "ipc")
    out = host.home / "told"
    argv = ("sh", "-c", f"printenv PEERKV_KEPT_MEMORY > {out}")
    host.tell(Spawn("replica", argv, {"PATH": os.environ["PATH"]}, socket, scratch, str(host.home / "r.log"), 1 << 20, 4096))
    event = host.next()
    assert isinstance(event, Spawned)
    assert host.next() == Exited("replica", event.pid, 0)
    return decode_kept(out.read_text())
