"""Which replica gets a request, and whom it may import from. A pure function of what is known at that moment.

First form: the replica that holds the longest prefix, unless it is busy and another is less so. A later cost model takes its
place behind the same signature.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that may take the request.

    `held_blocks` leading blocks of the prompt are in its KV cache, `in_flight` requests are with it, and it can import from
    the replicas in `exchanges_with`.
    """

    name: str
    held_blocks: int
    in_flight: int
    exchanges_with: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Decision:
    """Send the request to `replica`; it may import from `source`, None if nobody holds more than it does."""

    replica: str
    source: str | None
    reason: str


def steer(candidates: Sequence[Candidate], *, replica_requests_max: int, turn: int = 0) -> Decision:
    """Pick a replica. From `replica_requests_max` requests in flight on, a holder is relieved by whoever has fewer.

    `turn` rotates among equals; let it grow by one with each request. The order of `candidates` does not matter.
    Raises ValueError if there are none.
    """
    if not candidates:
        raise ValueError("no candidates")
    rotated = _rotate(sorted(candidates, key=lambda candidate: candidate.name), turn)
    holder = min(rotated, key=lambda candidate: (-candidate.held_blocks, candidate.in_flight))
    idlest = min(rotated, key=lambda candidate: (candidate.in_flight, -candidate.held_blocks))
    if holder.held_blocks == 0:
        return Decision(idlest.name, None, "nobody holds its prefix: the least busy")
    if holder.in_flight < replica_requests_max:
        return Decision(holder.name, None, f"holds {holder.held_blocks} blocks")
    if idlest.in_flight >= holder.in_flight:
        return Decision(holder.name, None, f"holds {holder.held_blocks} blocks, and nobody is less busy")
    source = best_source(idlest, rotated)
    where = f", import from {source}" if source else ""
    return Decision(idlest.name, source, f"{holder.name} holds {holder.held_blocks} blocks but is busy{where}")


def best_source(taker: Candidate, candidates: Sequence[Candidate]) -> str | None:
    """Return the replica with the longest prefix among those that `taker` can import from and that hold more than it does."""
    holders = [
        candidate
        for candidate in candidates
        if candidate.name != taker.name and candidate.name in taker.exchanges_with and candidate.held_blocks > taker.held_blocks
    ]
    if not holders:
        return None
    return min(holders, key=lambda candidate: (-candidate.held_blocks, candidate.in_flight, candidate.name)).name


def _rotate(candidates: Sequence[Candidate], turn: int) -> list[Candidate]:
    start = turn % len(candidates)
    return [*candidates[start:], *candidates[:start]]
