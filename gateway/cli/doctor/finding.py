"""One finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth knowing. A problem keeps replicas from starting or sharing; anything else is a note."""

    problem: bool
    what: str
    remedy: str


def in_words(size_bytes: int) -> str:
    """Return a size in human-readable form."""
    return f"{size_bytes / (1 << 30):.1f} GiB" if size_bytes >= 1 << 30 else f"{size_bytes / (1 << 20):.0f} MiB"
