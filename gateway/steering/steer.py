"""Which replica gets a request and what it imports from where: whatever gives the earliest first token. Pure.

For each replica the time to the first token is its queue, plus importing what a source holds, plus computing what nobody
supplies (costs/). Differences smaller than the model's error are ties, and a tie goes to the replica that holds the prefix.
"""

from collections.abc import Sequence

import xxhash

from gateway.steering.choices import CUDA, SCORE, Candidate, Choice, Decision, Expected, Option, PromptView
from gateway.steering.costs.model import CostModel
from gateway.steering.costs.priors import REMOTE_TRANSPORT
from gateway.steering.scoring import HOLDERS_MAX, TAKERS_MAX, Scoring, Taker

__all__ = [
    "CUDA",
    "REMOTE_TRANSPORT",
    "Candidate",
    "Choice",
    "Decision",
    "Expected",
    "Option",
    "PromptView",
    "affinity_weight",
    "steer",
]

OPTIONS_KEPT_MAX = 8


def steer(
    prompt: PromptView,
    candidates: Sequence[Candidate],
    costs: CostModel,
    now: float,
    turn: int = 0,
    names: Sequence[str] | None = None,
) -> Decision:
    """Pick a replica and a source. Raises ValueError if no candidate takes requests.

    `turn` rotates among equals; increase it by one per request. The order of `candidates` does not matter; `names` are their
    sorted names, if already known.
    """
    costs.pass_time(now)
    if names is None:
        names = sorted([candidate.name for candidate in candidates])
    scoring = Scoring(prompt, candidates, costs, now, names[turn % len(names)] if names else "")
    takers, holders = scoring.takers, scoring.holders
    if not takers:
        raise ValueError("no candidates")
    if len(takers) > TAKERS_MAX:
        takers = takers[: min(holders, HOLDERS_MAX)] + takers[holders : holders + TAKERS_MAX]
    options = [scoring.best_option(taker) for taker in takers]
    chosen = _chosen(options, scoring, prompt.affinity, costs.uncertainty())
    if len(options) > OPTIONS_KEPT_MAX:
        options = sorted(options, key=SCORE)[:OPTIONS_KEPT_MAX]
    return Decision(
        replica=chosen.replica,
        source=chosen.source,
        action=chosen.action,
        import_tokens_max=chosen.import_tokens_max,
        expected=chosen.expected,
        best_available_tokens=scoring.best_available,
        weighed=tuple(options),
    )


def affinity_weight(affinity: str, replica: str) -> int:
    """Rendezvous hashing: the replica with the largest weight gets the request, so that a change of the fleet moves few."""
    return xxhash.xxh3_64_intdigest(f"{len(affinity)}:{affinity}{replica}".encode("utf-8", "surrogatepass"))


def _favourite(affinity: str, scoring: Scoring, doubt_seconds: float) -> Taker:
    """Of replicas that differ only in the work ahead, and by no more than the doubt, return the one for this affinity."""
    delays = [(scoring.delay(taker), taker) for taker in scoring.takers]
    limit = min(delay for delay, _ in delays) + doubt_seconds
    equal = [taker for delay, taker in delays if delay <= limit]
    return max(equal, key=lambda taker: (affinity_weight(affinity, taker.candidate.name), taker.candidate.name))


def _chosen(options: Sequence[Option], scoring: Scoring, affinity: str, doubt: float) -> Option:
    """Return the best option, or one indistinguishable from it: the one for the affinity, or one with more of the prefix."""
    best = options[0]
    for option in options:
        if option.score < best.score:
            best = option
    if affinity and not scoring.holders:
        return scoring.best_option(_favourite(affinity, scoring, doubt * best.score))
    a, chosen, most = best.expected, best, best.expected.local_tokens
    for option in options:
        b = option.expected
        if b.local_tokens <= most and (b.local_tokens < most or option.score >= chosen.score):
            continue
        # what both have in common does not add to the doubt
        differs = (
            abs(a.queue_seconds - b.queue_seconds)
            + abs(a.transfer_seconds - b.transfer_seconds)
            + abs(a.prefill_seconds - b.prefill_seconds)
        )
        if option.score - best.score <= doubt * differs:
            chosen, most = option, b.local_tokens
    return chosen
