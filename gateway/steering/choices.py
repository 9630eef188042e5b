"""What steering considers and what it decides: plain values."""

from enum import StrEnum
from math import inf
from operator import attrgetter

import msgspec

from gateway.steering.costs.model import ModelKey
from gateway.steering.costs.replica_load import IDLE, ReplicaLoad
from gateway.steering.evictions import NOTHING_AGAIN, Again
from transport.node.names import node_of
from transport.table.tiers import way

CUDA = ModelKey("cuda")


class Choice(StrEnum):
    """What happens to the prefix."""

    HIT = "hit"  # the replica holds it, or is computing it
    PULL = "pull"  # everything that the source holds is imported
    SPLIT = "split"  # the beginning is imported, the rest computed although the source holds it
    RECOMPUTE = "recompute"  # no cache is used


class PromptView(msgspec.Struct, frozen=True, gc=False):
    """What steering needs to know about a prompt.

    `affinity` is the caller's hint about which requests belong together. `rate` is how many requests per second begin with the
    prefix that the best holder has, `decode_seconds` how long answers take after their first token. `again` is what has to be
    recomputed for each token of KV that a cache evicts. An import may end at any multiple of `block_size` tokens.
    """

    tokens: int
    affinity: str = ""
    rate: float = 0.0
    decode_seconds: float = 0.0
    block_size: int = 1
    again: Again = NOTHING_AGAIN


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A ready replica. It holds the first `held_tokens` of the prompt and can import from the replicas in `exchanges_with`.

    `promised_tokens` of it are being computed there for another request. `takes` says whether it may get this request, rather
    than only be a source. `room_tokens` of its cache are free: some are for the work in `load`, and anything beyond evicts
    blocks. Between nodes KV goes over REMOTE_TRANSPORT, within a node over the source's `transport`. One is made per replica
    and request: a struct takes a fifth of the time of a dataclass or a named tuple.
    """

    name: str
    held_tokens: int = 0
    load: ReplicaLoad = IDLE
    exchanges_with: frozenset[str] = frozenset()
    key: ModelKey = CUDA
    transport: str = "cuda_ipc"
    promised_tokens: int = 0
    takes: bool = True
    node: str = ""
    room_tokens: float = inf
    tier: str = ""
    """With an import from this tier it has the first `tier_tokens` of the prompt."""
    tier_tokens: int = 0

    def stored(self) -> "Candidate":
        """Return its tier as a source of imports."""
        return Candidate(self.tier, self.tier_tokens, transport=way(self.transport, self.tier), node=node_of(self.tier))


class Expected(msgspec.Struct, frozen=True, gc=False):
    """What is expected for a request: seconds, and prompt tokens by the source of their KV."""

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


class Option(msgspec.Struct, frozen=True, gc=False):
    """One possible decision. `score` is in seconds: the time to the first token plus what the choice costs others."""

    replica: str
    source: str | None
    action: Choice
    import_tokens_max: int | None
    expected: Expected
    score: float

    @property
    def seconds(self) -> float:
        """Until the first token."""
        return self.expected.seconds


SCORE = attrgetter("score")


class Decision(msgspec.Struct, frozen=True, gc=False):
    """Send the request to `replica`; import from `source` up to `import_tokens_max` prompt tokens in all (None: what it holds).

    `best_available_tokens` is the longest prefix that any replica held or computed; `weighed` are the options considered, at
    least one.
    """

    replica: str
    source: str | None
    action: Choice
    import_tokens_max: int | None
    expected: Expected
    best_available_tokens: int
    weighed: tuple[Option, ...]

    @property
    def options(self) -> tuple[Option, ...]:
        """The options considered, best first."""
        return tuple(sorted(self.weighed, key=SCORE))

    @property
    def reason(self) -> str:
        """The reason in words, put together on request."""
        expected = self.expected
        match self.action:
            case Choice.HIT:
                what = f"holds {expected.local_tokens} tokens"
            case Choice.PULL:
                what = f"imports {expected.peer_tokens} tokens from {self.source}"
            case Choice.SPLIT:
                what = f"imports {expected.peer_tokens} tokens from {self.source} and computes the tail"
            case Choice.RECOMPUTE:
                available = self.best_available_tokens
                what = f"computing is sooner than {available} tokens elsewhere" if available else "nobody holds its prefix"
        best = min(self.weighed, key=SCORE).replica
        tie = "" if self.replica == best else f", a tie with {best} within the model's error"
        return f"{what}: {expected.seconds * 1e3:.0f} ms expected{tie}"
