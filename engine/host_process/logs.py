"""The logs of replicas: kept within bounds, and read back to say why a replica ended."""

import contextlib
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Iterable
from io import FileIO
from pathlib import Path

from engine.fleet import FleetError

log = logging.getLogger("peerkv.logs")

LOG_READ_BYTES = 65536
LOG_TAIL_LINES = 12
VALIDATION_ERROR = "ValidationError"
FINAL_STATUSES = frozenset({2, 126, 127})  # of a wrong command line, and of a program that cannot be run
PROBE_BYTES = 4096
LOG_CHECK_SECONDS = 2.0  # between two checks of the sizes of growing logs

_ERROR = re.compile(r"\b([A-Za-z_][\w.]*(?:Error|Exception|Refused)): (\S.*)")
_USAGE = re.compile(r"^\S+: error: (\S.*)")  # of a command line
_INVALID = re.compile(r"^\s+(\S.*?)(?: \[type=.*)?$")  # what pydantic says in the line after its error
_CONSEQUENCE = re.compile(r"Engine core initialization failed|Failed core proc|EngineDeadError")


def open_log(path: Path) -> FileIO:
    """Open a log for appending, with mode 0600 if it is new. Raises OSError."""
    return FileIO(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab")


def rotate(path: Path, bytes_max: int) -> None:
    """Move a log of more than `bytes_max` bytes to <log>.1, replacing the one there."""
    if log_size(path) > bytes_max:
        path.replace(f"{path}.1")


def rotate_open(path: Path, bytes_max: int) -> None:
    """Like `rotate`, for a log that a process appends to: its bytes are copied to <log>.1 and the same file is truncated.

    Lines written between the two are lost. Raises OSError.
    """
    if log_size(path) > bytes_max:
        shutil.copyfile(path, f"{path}.1")
        shutil.copymode(path, f"{path}.1")
        os.truncate(path, 0)


class LogBounds:
    """Keeps logs that processes append to within their bounds and what is written in LOG_CHECK_SECONDS."""

    def __init__(self) -> None:
        self.due = 0.0  # of the monotonic clock: when `keep` looks again

    def keep(self, logs: Iterable[tuple[str, int]]) -> None:
        """Rotate those of `logs`, each a path and its bound in bytes, that are too long; not more often than due."""
        now = time.monotonic()
        if now < self.due:
            return
        self.due = now + LOG_CHECK_SECONDS
        for path, bytes_max in logs:
            try:
                rotate_open(Path(path), bytes_max)
            except OSError as error:
                log.error("%s cannot be rotated: %s", path, error.strerror)


def log_size(path: Path) -> int:
    """Bytes in a log, 0 if there is none: where the next run's lines begin."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def log_lines(path: Path, start: int) -> list[str]:
    """Return the non-blank lines after byte `start`, within the last LOG_READ_BYTES; none without a log."""
    size = log_size(path)
    try:
        with path.open("rb") as stream:
            stream.seek(max(start if start <= size else 0, size - LOG_READ_BYTES))
            text = stream.read(LOG_READ_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()]


def root_cause(lines: list[str]) -> str:
    """The error in a log that explains the others, or "": the last that is not a mere consequence of one."""
    for at in reversed(range(len(lines))):
        line = lines[at]
        if usage := _USAGE.search(line):
            return usage[1]
        found = _ERROR.search(line)
        if found and not _CONSEQUENCE.search(line):
            if (
                found[1].endswith(VALIDATION_ERROR)
                and at + 1 < len(lines)
                and (said := _INVALID.search(_unprefixed(lines[at + 1])))
            ):
                return f"{VALIDATION_ERROR}: {said[1]}"
            return f"{found[1]}: {found[2]}"
    return ""


def full_disk(log: Path) -> str:
    """Says that a log has no room, else "": many a program ends when it cannot write."""
    status = os.statvfs(log.parent)
    return "" if status.f_bavail else f"{log.parent} is full, so nothing was logged"


def is_final(code: int, cause: str) -> bool:
    """Whether another start would end the same way: the program or its arguments are wrong."""
    return code in FINAL_STATUSES or cause.startswith(VALIDATION_ERROR)


def prepare_log_dir(log_dir: Path) -> None:
    """Make the directory, and see that it can be written to. Raises FleetError."""
    probe = log_dir / ".peerkv-probe"
    try:
        log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe.write_bytes(bytes(PROBE_BYTES))
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise FleetError(
            f"cannot write logs to {log_dir}: {error.strerror}. Make room, or name another log_dir (--log-dir, PEERKV_LOG_DIR)"
        ) from error


def _unprefixed(line: str) -> str:
    """A line without what vLLM puts before those of its processes."""
    return re.sub(r"^(\([^)]*\)|[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^]]*\]) ", "", line)


def describe_exit(code: int) -> str:
    """Describe an exit status; negative means a signal."""
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
