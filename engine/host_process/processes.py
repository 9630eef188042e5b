"""Linux process functions that the replica host relies on: who dies with whom, and who is left of a group."""

import ctypes
import os
import signal
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)  # loaded now, so that nothing has to be loaded after a fork


def become_subreaper() -> None:
    """Orphans among our descendants become our children, so that none escapes. Raises OSError."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent_pid: int) -> None:
    """Get killed as soon as the thread that forked us ends; exit at once if it already has."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def session_members(session: int) -> tuple[int, ...]:
    """The live (not zombie) processes of a session."""
    return tuple(pid for pid, fields in _stats() if int(fields[3]) == session and fields[0] not in "ZX")


def children(parent_pid: int) -> tuple[int, ...]:
    """The live (not zombie) children of a process."""
    return tuple(pid for pid, fields in _stats() if int(fields[1]) == parent_pid and fields[0] not in "ZX")


def is_resource_tracker(pid: int) -> bool:
    """Whether `pid` is Python's tracker of shared memory: once its users are gone, it removes what they left."""
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pid: int) -> None:
    """SIGKILL `pid`, if it still exists."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def _stats() -> list[tuple[int, list[str]]]:
    """Of each process its id and the fields of /proc/<pid>/stat after the name: state, ppid, pgrp, session, …"""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            found.append((int(entry), text[text.rindex(")") + 2 :].split()))
    return found
