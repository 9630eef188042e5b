"""Which replica gets a request, and what it imports from whom: whatever gives the first token soonest. Pure.

For each replica the time to the first token is its queue, plus importing what a source holds, plus computing what nobody
supplies (costs.py). Differences that the model is not sure of are ties, and a tie stays with who holds the prefix.
"""

from collections.abc import Iterable, Sequence
from heapq import nsmallest
from operator import attrgetter

import xxhash

from gateway.choices import CUDA, Action, Candidate, Decision, Expected, Option, PromptView
from gateway.costs import CostModel
from gateway.weighing import HOLDERS_MAX, REMOTE_TRANSPORT, TAKERS_MAX, Taker, Weighing

__all__ = [
    "CUDA",
    "REMOTE_TRANSPORT",
    "Action",
    "Candidate",
    "Decision",
    "Expected",
    "Option",
    "PromptView",
    "affinity_weight",
    "steer",
]

OPTIONS_SHOWN_MAX = 8
_SCORE = attrgetter("score")


def steer(prompt: PromptView, candidates: Sequence[Candidate], costs: CostModel, now: float, turn: int = 0) -> Decision:
    """Pick a replica and a source. Raises ValueError if no candidate takes requests.

    `turn` rotates among equals; let it grow by one with each request. The order of `candidates` does not matter.
    """
    costs.pass_time(now)
    weighing = Weighing(prompt, candidates, costs, now)
    holding, others = weighing.takers(turn)
    if not holding and not others:
        raise ValueError("no candidates")
    doubt = costs.uncertainty()
    takers = _first(HOLDERS_MAX, holding) + _first(TAKERS_MAX, others)
    options = [weighing.best_option(taker) for taker in takers]
    best = min(options, key=_SCORE)
    if prompt.affinity and not holding:
        chosen = weighing.best_option(_favourite(prompt.affinity, others, doubt * best.score))
    else:
        chosen = _nearest(options, best, doubt)
    options.sort(key=_SCORE)
    return Decision(
        chosen.replica,
        chosen.source,
        chosen.action,
        chosen.import_tokens_max,
        chosen.expected,
        weighing.best_available,
        _reason(chosen, best, weighing.best_available),
        tuple(options[:OPTIONS_SHOWN_MAX]),
    )


def _first(count: int, takers: list[Taker]) -> list[Taker]:
    """The first by rank, in order."""
    if len(takers) > count:
        return nsmallest(count, takers)
    takers.sort()
    return takers


def affinity_weight(affinity: str, replica: str) -> int:
    """Rendezvous hashing: the replica with the largest weight gets it, so that a change of the fleet moves few."""
    return xxhash.xxh3_64_intdigest(f"{len(affinity)}:{affinity}{replica}".encode("utf-8", "surrogatepass"))


def _favourite(affinity: str, takers: Sequence[Taker], doubt_seconds: float) -> Taker:
    """Of replicas that differ by what is in front of them alone, and by no more than the doubt: the one for this affinity."""
    limit = min(taker.queue_seconds + taker.crowd_seconds for taker in takers) + doubt_seconds
    equal: Iterable[Taker] = (taker for taker in takers if taker.queue_seconds + taker.crowd_seconds <= limit)
    return max(equal, key=lambda taker: (affinity_weight(affinity, taker.candidate.name), taker.candidate.name))


def _nearest(options: Sequence[Option], best: Option, doubt: float) -> Option:
    """The best option, or one with more of the prefix that can not be told from it."""
    a = best.expected
    chosen = best
    for option in options:
        b = option.expected
        if b.local_tokens < chosen.expected.local_tokens or option is chosen:
            continue
        # what both have in common is no source of doubt
        differs = (
            abs(a.queue_seconds - b.queue_seconds)
            + abs(a.transfer_seconds - b.transfer_seconds)
            + abs(a.prefill_seconds - b.prefill_seconds)
        )
        more = b.local_tokens > chosen.expected.local_tokens or option.score < chosen.score
        if more and option.score - best.score <= doubt * differs:
            chosen = option
    return chosen


def _reason(chosen: Option, best: Option, available: int) -> str:
    expected = chosen.expected
    match chosen.action:
        case Action.HIT:
            what = f"holds {expected.local_tokens} tokens"
        case Action.PULL:
            what = f"imports {expected.peer_tokens} tokens from {chosen.source}"
        case Action.SPLIT:
            what = f"imports {expected.peer_tokens} tokens from {chosen.source} and computes the tail"
        case Action.RECOMPUTE:
            what = f"computing is sooner than {available} tokens elsewhere" if available else "nobody holds its prefix"
    tie = "" if chosen.replica == best.replica else f", as soon as {best.replica} for all we know"
    return f"{what}: {expected.seconds * 1e3:.0f} ms expected{tie}"
