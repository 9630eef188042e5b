"""What computing takes with one model, by the terms that were fitted last. Pure; times are in seconds.

One object for each model lives as long as the cost model, so that a decision finds all it needs of it in one place.
"""

from gateway.steering.costs.priors import DeviceKind, PrefillTerms
from gateway.steering.costs.replica_load import ReplicaLoad
from gateway.steering.costs.slowdown import Slowdown

CHUNK_TOKENS = 8192
"""Prompt tokens of a scheduling step, for counting the steps that running decodes slow down."""


class ModelTimes:
    """The terms of one model, those of its `kind` of device before anything was learnt, and the slowdown of its machines.

    Beside them lies what was reckoned with them for the decision that is being made: objects of its own would take longer to
    make than all that is put into them.
    """

    __slots__ = (
        "again",
        "decode_step",
        "decodes_full",
        "each",
        "factor",
        "fixed",
        "free_tokens",
        "new_token",
        "pair",
        "prompt_token",
        "reckoned",
        "slowdown",
        "waits",
    )  # fmt: skip

    def __init__(self, kind: DeviceKind) -> None:
        self.free_tokens = kind.free_tokens
        self.decodes_full = kind.decodes_full
        self.slowdown = Slowdown()
        self.learn(kind.prefill)
        self.begin(0.0, 0.0)

    def begin(self, now: float, decode_seconds: float) -> None:
        """A decision begins; answers take `decode_seconds` behind their first token."""
        self.factor = factor = self.slowdown.factor(now)
        """The slowdown now, one for all replicas with that model: it changes what is expected, and nothing in whom of."""
        self.each = decode_seconds * factor / self.decodes_full
        """Seconds that a request takes longer for each other one that is decoded beside it."""
        self.reckoned: dict[int, tuple[float, float]] = {}
        """What `computing` said of the prompt, by the tokens that are cached."""
        self.waits: tuple[float, float] | None = None
        self.again: float | None = None

    def learn(self, terms: PrefillTerms) -> None:
        """These are the coefficients from now on."""
        self.fixed, self.prompt_token, self.new_token, self.pair, self.decode_step = terms

    def paid(self, prompt_tokens: int, new_tokens: int) -> tuple[int, float]:
        """Of a prompt's new tokens and their pairs, what costs time beyond that of a step for one token."""
        paid = max(0, new_tokens - self.free_tokens)
        return paid, pairs(prompt_tokens - paid, paid)

    def computing(self, cached_tokens: int, prompt_tokens: int) -> tuple[float, float]:
        """Return the seconds to the first token from a prompt's first step on, and by how much what waits there waits longer.

        `cached_tokens` of the prompt are there; handling it is in the former. Nothing is decoded meanwhile.
        """
        seconds = self.fixed + self.prompt_token * prompt_tokens
        paid = prompt_tokens - cached_tokens - self.free_tokens
        if paid <= 0:
            return seconds, 0.0
        work, pair = self.new_token * paid, self.pair
        return (
            seconds + work + pair * (paid * (prompt_tokens - paid + paid / 2)),
            work + pair * (paid * (cached_tokens + paid / 2)),
        )

    def slowed_seconds(self, decoding: int, new_tokens: int) -> float:
        """How much longer computing takes while others are decoded."""
        return self.decode_step * decoding * new_tokens / CHUNK_TOKENS

    def work_seconds(self, tokens: float, work_pairs: float) -> float:
        """Computing `tokens` new tokens with `work_pairs`, without what each request costs beside."""
        return self.new_token * tokens + self.pair * work_pairs

    def queue_seconds(self, load: ReplicaLoad, now: float) -> float:
        """Until a new prompt's first step, behind the work ahead of it."""
        new_token, pair = self.new_token, self.pair
        tokens, ahead_pairs = load.ahead(now, new_token, pair)
        seconds = new_token * tokens + pair * ahead_pairs
        return seconds + self.decode_step * load.decoding * (1 + tokens / CHUNK_TOKENS) if load.decoding else seconds


def pairs(cached_tokens: float, new_tokens: float) -> float:
    """Pairs of a new token and one before it: what attention computes for `new_tokens` behind `cached_tokens`."""
    return new_tokens * (cached_tokens + new_tokens / 2)
