"""The supervisor's side of a replica host: start it, send commands, receive events."""

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from engine.host_process import processes
from engine.host_process.logs import describe_exit, log_lines, log_size, open_log, root_cause, rotate
from engine.host_process.messages import LINE_BYTES_MAX, Command, Event, Exited, Quit, Spawned, decode_event, encode_line
from engine.replicas.launch import EngineSettings


class HostLink:
    """One running replica host."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, log_start: int) -> None:
        self._process = process
        self._log = log
        self._log_start = log_start
        self._sessions: set[int] = set()

    @classmethod
    async def open(cls, settings: EngineSettings, held: tuple[int, ...], env: Mapping[str, str]) -> "HostLink":
        """Start a host in its own session. The descriptors `held` stay open until it ends. Raises OSError."""
        command = [sys.executable, "-m", "engine.host_process", "--hold", *map(str, held)]
        command += ["--run-dir", str(settings.run_dir), "--table-dir", str(settings.table_dir)]
        if settings.preloads:
            command.append("--preload")
        log = settings.log_dir / "host.log"
        rotate(log, settings.log_bytes_max)
        start = log_size(log)
        with open_log(log) as errors:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env=dict(env),
                pass_fds=held,
                start_new_session=True,
                limit=LINE_BYTES_MAX,
            )
        return cls(process, log, start)

    @property
    def pid(self) -> int:
        """The host's process id."""
        return self._process.pid

    def tell(self, command: Command) -> None:
        """Send `command` without waiting. If the host is gone nothing happens: `events` ends then."""
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(encode_line(command))

    async def events(self) -> AsyncIterator[Event]:
        """Yield what the host reports, until it ends. Raises msgspec.MsgspecError, ValueError (a line too long)."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            event = decode_event(line)
            if isinstance(event, Spawned):
                self._sessions.add(event.pid)
            elif isinstance(event, Exited):
                self._sessions.discard(event.pid)
            yield event

    async def close(self, seconds_max: float) -> None:
        """Make the host stop everything and wait for it at most `seconds_max`; then kill it."""
        try:
            self.tell(Quit())
            async with asyncio.timeout(seconds_max):
                await self._process.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> str:
        """Kill the host if it is still running, and what is left of its replicas. Returns how it ended, in words."""
        if self._process.returncode is None:
            processes.kill(self._process.pid)
        status = await self._process.wait()
        for session in self._sessions:
            for pid in processes.session_members(session):
                processes.kill(pid)
        cause = root_cause(log_lines(self._log, self._log_start)) if status > 0 else ""
        return describe_exit(status) + (f": {cause}" if cause else "")
