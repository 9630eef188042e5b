"""One thing that the doctor found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know. A problem stops replicas from starting or from sharing; anything else is a note."""

    problem: bool
    what: str
    remedy: str


def in_words(size_bytes: int) -> str:
    """A size as people read it."""
    return f"{size_bytes / (1 << 30):.1f} GiB" if size_bytes >= 1 << 30 else f"{size_bytes / (1 << 20):.0f} MiB"
