"""What a replica may import from, in each arm: engines read it from a file at each look-up, so that they serve every arm."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from transport.table.tiers import is_tier

VARIABLE = "BENCH_REACH"
"""The variable in an engine's environment that names the file."""


class Reach(StrEnum):
    """How far a replica reaches, beyond its own KV cache and its own region of host memory."""

    POOL = "pool"
    """Every region of host memory, and the other replicas' KV caches: peerkv as it is."""
    CACHES = "caches"
    """The other replicas' KV caches."""
    NOTHING = "nothing"

    def allows(self, source: str, own_region: str) -> bool:
        """Tell whether a replica with this region of its own may import from the table `source`."""
        if self is Reach.POOL or source == own_region:
            return True
        return self is Reach.CACHES and not is_tier(source)


def write(where: Path, reach: Reach) -> None:
    """Let it hold for all engines that were given this file."""
    draft = where.with_suffix(".draft")
    draft.write_text(reach)
    draft.replace(where)


def read(where: Path) -> Reach:
    """Return what holds now. Raises OSError, ValueError."""
    return Reach(where.read_text())
