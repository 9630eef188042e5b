"""Which replica gets a request, and what it imports from whom: whatever gives the first token soonest. Pure.

For each replica the time to the first token is its queue, plus importing what a source holds, plus computing what nobody
supplies (costs.py). Differences that the model is not sure of are ties, and a tie stays with who holds the prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import xxhash

from gateway.costs import DEVICE_KINDS, CostModel, ModelKey, pairs
from gateway.load import IDLE, ReplicaLoad
from gateway.promises import Promise

SOURCES_MAX = 8
"""Sources weighed for a replica: those that hold most, the least read first."""
TAKERS_MAX = 16
"""Replicas without any of the prefix that are weighed in full: those with the least in front of a request."""
HOLDERS_MAX = 64
OPTIONS_SHOWN_MAX = 8
SPLIT_GAIN_SECONDS_MIN = 5e-4
"""A split that saves less is not worth its name: over NVLink a token's KV comes in less than a microsecond."""
BUSY_MAX = 0.95
"""A hot prefix is not reckoned to keep its holders busier than this, so that the wait expected of it stays finite."""
REMOTE_TRANSPORT = "rdma"
CUDA = ModelKey("cuda")


class Action(StrEnum):
    """What becomes of the prefix."""

    HIT = "hit"  # the replica holds it, or is computing it
    PULL = "pull"  # imported from the source, all that it holds
    SPLIT = "split"  # the head is imported, the tail computed although the source holds it
    RECOMPUTE = "recompute"  # nobody's cache is used


@dataclass(frozen=True, slots=True)
class PromptView:
    """What steering needs to know of a prompt.

    `affinity` is the caller's hint which requests belong together. `rate` is how many requests a second begin with the
    prefix that the best holder holds, `decode_seconds` how long answers take behind their first token.
    """

    tokens: int
    affinity: str = ""
    rate: float = 0.0
    decode_seconds: float = 0.0
    block_size: int = 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """A ready replica. It holds the first `held_tokens` of the prompt and can import from the replicas in `exchanges_with`.

    `promise` is what it computes now for another request, `takes` says whether it may get this one (or be a source only).
    Between nodes KV goes over REMOTE_TRANSPORT, within one over the source's `transport`.
    """

    name: str
    held_tokens: int = 0
    load: ReplicaLoad = IDLE
    exchanges_with: frozenset[str] = frozenset()
    key: ModelKey = CUDA
    transport: str = "cuda_ipc"
    promise: Promise | None = None
    takes: bool = True
    node: str = ""


@dataclass(frozen=True, slots=True)
class Expected:
    """What is expected of a request: seconds, and prompt tokens by where their KV comes from."""

    queue_seconds: float
    transfer_seconds: float
    prefill_seconds: float
    local_tokens: int
    peer_tokens: int
    computed_tokens: int

    @property
    def seconds(self) -> float:
        """Until the first token."""
        return self.queue_seconds + self.transfer_seconds + self.prefill_seconds


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that could be done. `score` is in seconds: the time to the first token, and what the choice costs others."""

    replica: str
    source: str | None
    action: Action
    import_tokens_max: int | None
    expected: Expected
    score: float


@dataclass(frozen=True, slots=True)
class Decision:
    """Send the request to `replica`; import from `source` up to `import_tokens_max` prompt tokens in all (None: what it holds).

    `best_available_tokens` is the longest prefix that any replica held or computed; `options` what was weighed, best first.
    """

    replica: str
    source: str | None
    action: Action
    import_tokens_max: int | None
    expected: Expected
    best_available_tokens: int
    reason: str
    options: tuple[Option, ...] = ()


def steer(prompt: PromptView, candidates: Sequence[Candidate], costs: CostModel, now: float, turn: int = 0) -> Decision:
    """Pick a replica and a source. Raises ValueError if no candidate takes requests.

    `turn` rotates among equals; let it grow by one with each request. The order of `candidates` does not matter.
    """
    weighed = _Weighing(prompt, candidates, costs, now)
    takers = weighed.takers(turn)
    if not takers:
        raise ValueError("no candidates")
    options = [weighed.best_option(taker, queue) for taker, queue in takers]
    chosen = _choose(prompt, options, weighed, costs.uncertainty())
    shown = tuple(sorted(options, key=lambda option: option.score)[:OPTIONS_SHOWN_MAX])
    return Decision(
        chosen.replica,
        chosen.source,
        chosen.action,
        chosen.import_tokens_max,
        chosen.expected,
        weighed.best_available,
        _reason(chosen, shown[0], weighed),
        shown,
    )


class _Weighing:
    """One request against one fleet."""

    def __init__(self, prompt: PromptView, candidates: Sequence[Candidate], costs: CostModel, now: float) -> None:
        self._prompt = prompt
        self._costs = costs
        self._now = now
        self._useful = max(0, prompt.tokens - 1)  # at least one token is always computed
        self._candidates = candidates
        holders = [candidate for candidate in candidates if candidate.held_tokens > 0]
        holders.sort(key=lambda holder: (-holder.held_tokens, holder.load.reading, holder.name))
        self._sources = holders
        self._holders = len(holders)
        promised = max((candidate.promise.tokens for candidate in candidates if candidate.promise is not None), default=0)
        self.best_available = min(max(promised, holders[0].held_tokens if holders else 0), self._useful)

    def local(self, candidate: Candidate) -> int:
        """Tokens that need no import there: held, or computed by then for a request ahead of this one."""
        promised = candidate.promise.tokens if candidate.promise is not None else 0
        return min(max(candidate.held_tokens, promised), self._useful)

    def takers(self, turn: int) -> list[tuple[Candidate, float]]:
        """The replicas to weigh, each with the queue in front of it: those with some of the prefix, and the idlest others."""
        costs, now, decode_seconds = self._costs, self._now, self._prompt.decode_seconds
        holding: list[tuple[int, float, int, str, Candidate]] = []
        others: list[tuple[float, int, str, Candidate, float]] = []
        names = sorted(candidate.name for candidate in self._candidates)
        start = turn % len(names) if names else 0
        for candidate in self._candidates:
            if not candidate.takes:
                continue
            queue = 0.0 if candidate.load is IDLE else costs.queue_seconds(candidate.key, candidate.load, now)
            local = self.local(candidate)
            turned = int(candidate.name < names[start])
            if local > 0:
                holding.append((-local, queue, turned, candidate.name, candidate))
            else:
                crowd = crowding(candidate, decode_seconds) if candidate.load.decoding else 0.0
                others.append((queue + crowd, turned, candidate.name, candidate, queue))
        holding.sort(key=lambda entry: entry[:4])
        others.sort(key=lambda entry: entry[:3])
        kept = others if self._prompt.affinity and not self.best_available else others[:TAKERS_MAX]
        return [(entry[4], entry[1]) for entry in holding[:HOLDERS_MAX]] + [(entry[3], entry[4]) for entry in kept]

    def best_option(self, taker: Candidate, queue: float) -> Option:
        """The best that can be done on `taker`; an import only if it is sooner than computing."""
        local = self.local(taker)
        best = self._option(taker, queue, None, local, Action.HIT if local else Action.RECOMPUTE)
        for source in self._readable(taker, local):
            held = min(source.held_tokens, self._useful)
            pull = self._option(taker, queue, source, held, Action.PULL)
            cut = self._cut(taker, held)
            if local < cut < held:
                split = self._option(taker, queue, source, cut, Action.SPLIT)
                if split.score < pull.score - SPLIT_GAIN_SECONDS_MIN:
                    pull = split
            if pull.score < best.score and pull.expected.seconds < best.expected.seconds:
                best = pull
        return best

    def _readable(self, taker: Candidate, local: int) -> list[Candidate]:
        found: list[Candidate] = []
        for source in self._sources:
            if source.held_tokens <= local or len(found) == SOURCES_MAX:
                break
            if source.name != taker.name and source.name in taker.exchanges_with:
                found.append(source)
        return found

    def _cut(self, taker: Candidate, held: int) -> int:
        """Where a split is best: where computing begins to cost, as the time is concave in the cut before that."""
        size = self._prompt.block_size
        return min(held, (self._prompt.tokens - self._costs.free_tokens(taker.key)) // size * size)

    def _option(self, taker: Candidate, queue: float, source: Candidate | None, cached: int, action: Action) -> Option:
        prompt, costs = self._prompt, self._costs
        local = min(self.local(taker), cached)
        transfer = 0.0
        if source is not None:
            transport = source.transport if source.node == taker.node else REMOTE_TRANSPORT
            sharing = 1 + max(taker.load.importing, source.load.reading)
            transfer = costs.transfer_seconds(
                taker.name, source.name, transport, cached - local, sharing=sharing, device=taker.key.device
            )
        new = prompt.tokens - cached
        prefill = costs.prefill_seconds(taker.key, cached, new, taker.load.decoding)
        expected = Expected(queue, transfer, prefill, local, cached - local, new)
        score = expected.seconds + crowding(taker, prompt.decode_seconds)
        if prompt.rate > 0 and self.best_available:
            score += self._heat(taker, local)
        return Option(
            taker.name, source.name if source else None, action, cached if action is Action.SPLIT else None, expected, score
        )

    def _heat(self, taker: Candidate, local: int) -> float:
        """The wait to expect of further requests for this prefix: less once one replica more holds it."""
        prompt = self._prompt
        new = prompt.tokens - self.best_available
        work = self._costs.work_seconds(taker.key, new, pairs(self.best_available, new))
        kind = DEVICE_KINDS.get(taker.key.device, DEVICE_KINDS["cuda"])
        service = work + prompt.decode_seconds / kind.decodes_full
        holders = max(1, self._holders) + (local == 0)
        busy = min(prompt.rate * service / holders, BUSY_MAX)
        return service * busy / (2 * (1 - busy))  # M/D/1


def crowding(taker: Candidate, decode_seconds: float) -> float:
    """Seconds by which the answers that a replica is decoding slow down another one."""
    kind = DEVICE_KINDS.get(taker.key.device, DEVICE_KINDS["cuda"])
    return decode_seconds * taker.load.decoding / kind.decodes_full


def _choose(prompt: PromptView, options: Sequence[Option], weighed: _Weighing, uncertainty: float) -> Option:
    """The best option, or one that can not be told from it and suits better: where most of the prefix is, or by affinity."""
    best = min(options, key=lambda option: option.score)
    equal = [option for option in options if option.score - best.score <= uncertainty * _difference(option, best)]
    if prompt.affinity and not weighed.best_available:
        return max(equal, key=lambda option: (affinity_weight(prompt.affinity, option.replica), option.replica))
    most = max(option.expected.local_tokens for option in equal)
    return min((option for option in equal if option.expected.local_tokens == most), key=lambda option: option.score)


def _difference(one: Option, other: Option) -> float:
    """Seconds in which two options are not the same; what both have in common is no source of doubt."""
    a, b = one.expected, other.expected
    return (
        abs(a.queue_seconds - b.queue_seconds)
        + abs(a.transfer_seconds - b.transfer_seconds)
        + abs(a.prefill_seconds - b.prefill_seconds)
    )


def affinity_weight(affinity: str, replica: str) -> int:
    """Rendezvous hashing: the replica with the largest weight gets it, so that a change of the fleet moves few."""
    return xxhash.xxh3_64_intdigest(f"{len(affinity)}:{affinity}{replica}".encode("utf-8", "surrogatepass"))


def _reason(chosen: Option, best: Option, weighed: _Weighing) -> str:
    expected = chosen.expected
    ms = f"{expected.seconds * 1e3:.0f} ms expected"
    match chosen.action:
        case Action.HIT:
            what = f"holds {expected.local_tokens} tokens"
        case Action.PULL:
            what = f"imports {expected.peer_tokens} tokens from {chosen.source}"
        case Action.SPLIT:
            what = f"imports {expected.peer_tokens} tokens from {chosen.source} and computes the tail"
        case Action.RECOMPUTE:
            held = weighed.best_available
            what = "nobody holds its prefix" if not held else f"computing is sooner than {held} tokens elsewhere"
    tie = "" if chosen is best else f", as soon as {best.replica} for all we know"
    return f"{what}: {ms}{tie}"
