"""The process that owns the replicas: `python -m engine.host_process`, one thread, driven by lines on its stdin.

Nothing it starts outlives it. Each replica leads a session of its own and is killed by the kernel when this
process dies; when a replica ends, what is left of its session is killed here; when the supervisor dies, our
stdin ends, and we kill everything, remove the directories, and exit.
"""

import argparse
import logging
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.host_process import processes
from engine.host_process.directories import remove_claimed
from engine.host_process.kept_memory import VARIABLE, KeptMemories, encode_kept
from engine.host_process.logs import LogBounds, open_log, rotate
from engine.host_process.messages import (
    LINE_BYTES_MAX,
    Command,
    Event,
    Exited,
    Hello,
    Kill,
    Preloaded,
    Quit,
    Spawn,
    Spawned,
    Terminate,
    decode_command,
    encode_line,
)

log = logging.getLogger("peerkv.host")

TRACKER_GRACE_SECONDS = 2.0  # for Python's resource tracker to remove a dead replica's shared memory
SHUTDOWN_SECONDS_MAX = 10.0  # limit for killed processes to disappear
EXEC_FAILED = 127


@dataclass(frozen=True, slots=True)
class Running:
    """A replica's first process, which leads its session."""

    pid: int
    spawn: Spawn


class Host:
    """Owns the replicas. `control` and `report` are the descriptors of the two line streams, `memories` is kept for them."""

    def __init__(self, control: int, report: int, held: tuple[int, ...], memories: KeptMemories, *, preloaded: bool) -> None:
        self._memories = memories
        self._control = control
        self._report = report
        self._held = held
        self._preloaded = preloaded
        self._running: dict[str, Running] = {}
        self._sweeps: list[tuple[float, int]] = []  # (when, session) to kill without further grace
        self._log_bounds = LogBounds()
        self._buffer = b""
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def serve(self) -> bool:
        """Carry out commands until told to stop. True if told to quit or the supervisor is gone, False on a signal."""
        while True:
            readable, _, _ = select.select([self._control, self._wake_read], [], [], self._pause())
            if self._wake_read in readable and not self._drain_wakeups():
                return False
            self._reap()
            self._sweep()
            self._log_bounds.keep((r.spawn.log, r.spawn.log_bytes_max) for r in self._running.values())
            if self._control in readable and not self._read_commands():
                return True

    def say(self, event: Event) -> None:
        """Report `event`. A supervisor that is gone is noticed at the control stream, not here."""
        try:
            os.write(self._report, encode_line(event))
        except BrokenPipeError:
            log.info("nobody reads our reports")

    def end_all(self) -> None:
        """Kill every replica with all its processes, and wait for that at most SHUTDOWN_SECONDS_MAX."""
        deadline = time.monotonic() + SHUTDOWN_SECONDS_MAX
        for running in self._running.values():
            _kill_session(running.pid, spare_tracker=True)
        grace = time.monotonic() + TRACKER_GRACE_SECONDS
        while (left := processes.children(os.getpid())) and time.monotonic() < deadline:
            for pid in left:
                if time.monotonic() > grace or not processes.is_resource_tracker(pid):
                    processes.kill(pid)
            self._reap()
            time.sleep(0.01)
        self._reap()

    def _drain_wakeups(self) -> bool:
        """Whether to continue: SIGTERM and SIGHUP mean quit."""
        signals = os.read(self._wake_read, 4096)
        return signal.SIGTERM not in signals and signal.SIGHUP not in signals

    def _read_commands(self) -> bool:
        """Carry out what came in. False if that was Quit or the end of the stream. Raises msgspec.MsgspecError."""
        data = os.read(self._control, 65536)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            if not self._perform(decode_command(line)):
                return False
        if len(self._buffer) > LINE_BYTES_MAX:
            raise msgspec.DecodeError(f"a line of more than {LINE_BYTES_MAX} bytes")
        return bool(data)

    def _perform(self, command: Command) -> bool:
        match command:
            case Spawn():
                self._spawn(command)
            case Terminate(name) if name in self._running:
                os.kill(self._running[name].pid, signal.SIGTERM)
            case Kill(name) if name in self._running:
                _kill_session(self._running[name].pid, spare_tracker=True)
            case Quit():
                return False
        return True

    def _spawn(self, spawn: Spawn) -> None:
        if spawn.name in self._running:
            log.error("%s is already running", spawn.name)
            return
        _remove_traces(spawn)
        rotate(Path(spawn.log), spawn.log_bytes_max)
        self._keep_memory(spawn)
        parent = os.getpid()
        wait_fd, tell_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._be_replica(spawn, parent, wait_fd, tell_fd)
        os.close(tell_fd)
        os.read(wait_fd, 1)  # until it leads its session, or is dead: before, it could not be killed as one
        os.close(wait_fd)
        self._running[spawn.name] = Running(pid, spawn)
        self.say(Spawned(spawn.name, pid))

    def _keep_memory(self, spawn: Spawn) -> None:
        """Tell a replica what memory is kept for it, if any is."""
        if spawn.host_memory_bytes:
            try:
                named = Path(spawn.host_memory_dir) if spawn.host_memory_dir else None
                spawn.env[VARIABLE] = encode_kept(self._memories.keep(spawn.name, spawn.host_memory_bytes, named))
            except OSError as error:
                log.error("%s has no host memory: %s", spawn.name, error)

    def _be_replica(self, spawn: Spawn, parent: int, wait_fd: int, tell_fd: int) -> None:
        """In the forked child; never returns. The end of `tell_fd` tells the host that the session exists."""
        code = 1
        try:
            os.setsid()
            processes.die_with_parent(parent)
            os.close(tell_fd)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for fd in (
                wait_fd,
                self._control,
                self._report,
                self._wake_read,
                self._wake_write,
                *self._held,
                *self._memories.descriptors(),
            ):
                os.close(fd)
            _redirect_output(spawn.log)
            os.umask(0o077)
            os.makedirs(spawn.scratch, exist_ok=True)
            code = self._run(spawn)
        except BaseException:  # whatever it is, it must end here and not reach the host's own loop
            log.exception("%s could not be started", spawn.name)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _run(self, spawn: Spawn) -> int:
        """Become the server. Returns its exit status, unless this process is replaced by another program."""
        if spawn.program or not self._preloaded:
            try:
                os.execvpe(spawn.argv[0], spawn.argv, spawn.env)
            except OSError as error:
                log.error("cannot run %s: %s", spawn.argv[0], error.strerror)
                return EXEC_FAILED
        from engine.host_process.preload import run_server

        os.environ.clear()
        os.environ.update(spawn.env)
        tempfile.tempdir = None  # the host may have looked it up in its own environment
        try:
            run_server(spawn.argv)
        except SystemExit as leave:
            if isinstance(leave.code, str):
                log.error("%s", leave.code)
            return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        return 0

    def _reap(self) -> None:
        """Reap all ended children; those that are not replicas were orphaned inside one."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            name = next((n for n, r in self._running.items() if r.pid == pid), None)
            if name is not None:
                self._ended(self._running.pop(name), os.waitstatus_to_exitcode(status))

    def _ended(self, running: Running, code: int) -> None:
        self.say(Exited(running.spawn.name, running.pid, code))
        _kill_session(running.pid, spare_tracker=True)
        self._kill_strays()
        self._sweeps.append((time.monotonic() + TRACKER_GRACE_SECONDS, running.pid))
        _remove_traces(running.spawn)

    def _kill_strays(self) -> None:
        """Kill orphans that left their replica's session: they are our children now, but not replicas."""
        replicas = {r.pid for r in self._running.values()}
        for pid in processes.children(os.getpid()):
            if pid not in replicas and not processes.is_resource_tracker(pid):
                processes.kill(pid)

    def _sweep(self) -> None:
        while self._sweeps and self._sweeps[0][0] <= time.monotonic():
            _kill_session(self._sweeps.pop(0)[1], spare_tracker=False)

    def _pause(self) -> float | None:
        """Seconds until something is due, None if nothing is."""
        due = [when for when, _ in self._sweeps[:1]] + [self._log_bounds.due] * bool(self._running)
        return max(0.0, min(due) - time.monotonic()) if due else None


def _kill_session(session: int, *, spare_tracker: bool) -> None:
    """Kill all processes of a session, including those that left the first one's group."""
    killed: set[int] = set()
    while fresh := set(processes.session_members(session)) - killed:
        killed |= fresh
        for pid in fresh:
            if not (spare_tracker and processes.is_resource_tracker(pid)):
                processes.kill(pid)


def _remove_traces(spawn: Spawn) -> None:
    Path(spawn.socket).unlink(missing_ok=True)
    shutil.rmtree(spawn.scratch, ignore_errors=True)  # a dying process may still write there; the next start retries


def _redirect_output(path: str) -> None:
    with open_log(Path(path)) as log:
        for standard in (1, 2):
            os.dup2(log.fileno(), standard)


def _own_streams() -> tuple[int, int]:
    """Take stdin and stdout for ourselves: what libraries read is empty, what they print goes to stderr."""
    control, report = os.dup(0), os.dup(1)  # not inherited by programs
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return control, report


def main() -> None:
    """Entry point. The exit status is 0 after an ordered end."""
    options = argparse.ArgumentParser(prog="python -m engine.host_process")
    options.add_argument("--run-dir", type=Path, required=True)
    options.add_argument("--table-dir", type=Path, required=True)
    options.add_argument("--hold", type=int, nargs="*", default=[], help="descriptors to keep open until we end")
    options.add_argument("--preload", action="store_true", help="import vLLM now, and fork replicas from it")
    args = options.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s peerkv host: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    for fd in args.hold:
        os.set_inheritable(fd, False)
    control, report = _own_streams()
    processes.become_subreaper()
    host = Host(control, report, tuple(args.hold), KeptMemories(args.table_dir), preloaded=args.preload)
    last = False
    try:
        host.say(Hello(os.getpid()))
        if args.preload:
            from engine.host_process.preload import preload

            seconds = preload()
            host.say(Preloaded(seconds))
        last = host.serve()
    finally:
        host.end_all()
        if last:  # otherwise the supervisor lives and may start another host
            remove_claimed(args.run_dir)
            remove_claimed(args.table_dir)
