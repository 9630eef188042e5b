"""Compute times of one model, from the terms fitted last. Pure; times are in seconds.

One object for each model lives as long as the cost model, so that a decision finds everything about it in one place.
"""

from gateway.steering.costs.priors import DeviceKind, PrefillTerms
from gateway.steering.costs.replica_load import ReplicaLoad
from gateway.steering.costs.slowdown import Slowdown

CHUNK_TOKENS = 8192
"""Prompt tokens of a scheduling step, for counting the steps that running decodes slow down."""


class ModelTimes:
    """The terms of one model, those of its `kind` of device before anything was learnt, and the slowdown of its machines.

    It also holds what was computed from them for the decision being made: creating separate objects would take longer than
    filling them.
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
        """Begin a decision; answers take `decode_seconds` after their first token."""
        self.factor = factor = self.slowdown.factor(now)
        """The current slowdown, the same for all replicas with this model: it changes the expected times, not their order."""
        self.each = decode_seconds * factor / self.decodes_full
        """Extra seconds of a request for each other one being decoded at the same time."""
        self.reckoned: dict[int, tuple[float, float]] = {}
        """Results of `computing` for the prompt, by the number of cached tokens."""
        self.waits: tuple[float, float] | None = None
        self.again: float | None = None

    def learn(self, terms: PrefillTerms) -> None:
        """Set the coefficients."""
        self.fixed, self.prompt_token, self.new_token, self.pair, self.decode_step = terms

    def paid(self, prompt_tokens: int, new_tokens: int) -> tuple[int, float]:
        """Return the share of a prompt's new tokens and pairs that costs time beyond a step for one token."""
        paid = max(0, new_tokens - self.free_tokens)
        return paid, pairs(prompt_tokens - paid, paid)

    def computing(self, cached_tokens: int, prompt_tokens: int) -> tuple[float, float]:
        """Return the seconds from a prompt's first step to its first token, and the extra wait of the requests behind it.

        `cached_tokens` of the prompt are present; the former includes handling it. Nothing is decoded meanwhile.
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
        """Return how much longer computing takes while others are being decoded."""
        return self.decode_step * decoding * new_tokens / CHUNK_TOKENS

    def work_seconds(self, tokens: float, work_pairs: float) -> float:
        """Return the time of computing `tokens` new tokens with `work_pairs`, without the fixed cost of a request."""
        return self.new_token * tokens + self.pair * work_pairs

    def queue_seconds(self, load: ReplicaLoad, now: float) -> float:
        """Return the time until a new prompt's first step, after the work ahead of it."""
        new_token, pair = self.new_token, self.pair
        tokens, ahead_pairs = load.ahead(now, new_token, pair)
        seconds = new_token * tokens + pair * ahead_pairs
        return seconds + self.decode_step * load.decoding * (1 + tokens / CHUNK_TOKENS) if load.decoding else seconds


def pairs(cached_tokens: float, new_tokens: float) -> float:
    """Return the attention pairs of `new_tokens` after `cached_tokens`: each new token with every one before it."""
    return new_tokens * (cached_tokens + new_tokens / 2)
