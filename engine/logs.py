"""The logs of replicas: kept bounded, and read back to say why one ended."""

import re
import signal
from pathlib import Path

LOG_READ_BYTES = 65536
LOG_TAIL_LINES = 12

_ERROR = re.compile(r"\b([A-Za-z_][\w.]*(?:Error|Exception|Refused)): (\S.*)")
_CONSEQUENCE = re.compile(r"Engine core initialization failed|Failed core proc|EngineDeadError")


def rotate(path: Path, bytes_max: int) -> None:
    """Move a log of more than `bytes_max` bytes to <log>.1, over the one there."""
    if log_size(path) > bytes_max:
        path.replace(f"{path}.1")


def log_size(path: Path) -> int:
    """Bytes in a log, 0 when there is none: where the next run's lines begin."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def log_lines(path: Path, start: int) -> list[str]:
    """The lines after byte `start` that are not blank, of the last LOG_READ_BYTES; none without a log."""
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
    for line in reversed(lines):
        found = _ERROR.search(line)
        if found and not _CONSEQUENCE.search(line):
            return f"{found[1]}: {found[2]}"
    return ""


def describe_exit(code: int) -> str:
    """An exit status in words; negative is a signal."""
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
