"""What imports take: a fixed time and a time a byte, per pair of replicas and per transport. Pure; times are in seconds.

What is not tried is not measured. So that a few slow imports do not end imports for ever, what was learnt fades with time:
a pair that was not used for a while is taken for one like the others, and a transport for what is believed beforehand.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp

from gateway.steering.costs.fitting import Fit
from gateway.steering.costs.priors import TRANSPORT_PRIORS

PAIR_SAMPLES_MIN = 3
"""Fewer transfers between two replicas than this, and what all pairs of that transport took speaks for them."""
PAIRS_MAX = 4096
FADE_SECONDS = 1800.0
"""So long after its last import, 1/e is left of what was learnt of a transport, and nothing of what was learnt of a pair.

An import or a few in about that time is what it costs to find out that nothing changed.
"""
FADE_STEP_SECONDS = 1.0

Pair = tuple[str, str, str]
"""Taker, source, transport; the former two are empty for all pairs of a transport."""


@dataclass(slots=True)
class _Known:
    """`terms` are what the fit says now."""

    fit: Fit
    used_at: float
    terms: tuple[float, ...]

    def holds(self, now: float) -> float:
        """The share of what was learnt that is thought to hold still."""
        return exp(min(0.0, self.used_at - now) / FADE_SECONDS)

    def observe(self, kv_bytes: float, seconds: float, now: float) -> None:
        self.fit.observe((1.0, kv_bytes), seconds, self.holds(now))
        self.used_at = max(now, self.used_at)
        self.terms = self.fit.coefficients


class Transfers:
    """Expects and learns what imports take. Belongs to one thread."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._pairs: dict[Pair, _Known] = {}
        self._transports: dict[str, _Known] = {}
        self._now = 0.0

    def pass_time(self, now: float) -> None:
        """It is `now`, on the clock that `observe` is told too: what was learnt fades. Cheap."""
        if now - self._now >= FADE_STEP_SECONDS:
            self._now = now
            for known in self._transports.values():
                known.terms = known.fit.faded(known.holds(now))

    def terms(self, taker: str, source: str, transport: str) -> tuple[float, float]:
        """Seconds for each import, and for each byte of it, while no other import uses these replicas."""
        known = self._pair((taker, source, transport))
        if known is None or known.fit.samples < PAIR_SAMPLES_MIN:
            known = self._transport(transport)
        fixed, a_byte = known.terms
        return fixed, a_byte

    def observe(self, pair: Pair, kv_bytes: float, seconds: float, now: float) -> None:
        """Learn that an import took `seconds`. `kv_bytes` count once for each import that shared the way with it."""
        self.pass_time(now)
        common = self._transport(pair[2])
        known = self._pair(pair)
        if known is None:
            self._pairs.pop(pair, None)
            if len(self._pairs) >= PAIRS_MAX:
                del self._pairs[next(iter(self._pairs))]
            prior = tuple(max(value, 1e-12) for value in common.terms)
            known = self._pairs[pair] = _Known(Fit(prior, self._memory), now, prior)
        known.observe(kv_bytes, seconds, now)
        common.observe(kv_bytes, seconds, now)

    def known(self) -> Iterator[tuple[Pair, Fit, tuple[float, ...]]]:
        """Every fit that counts now with its terms: transports, then pairs."""
        for transport, known in sorted(self._transports.items()):
            yield ("", "", transport), known.fit, known.terms
        for pair in sorted(self._pairs):
            found = self._pair(pair)
            if found is not None:
                yield pair, found.fit, found.terms

    def _pair(self, pair: Pair) -> _Known | None:
        known = self._pairs.get(pair)
        return known if known is not None and self._now - known.used_at <= FADE_SECONDS else None

    def _transport(self, transport: str) -> _Known:
        known = self._transports.get(transport)
        if known is None:
            prior = TRANSPORT_PRIORS.get(transport, TRANSPORT_PRIORS["rdma"])
            known = self._transports[transport] = _Known(Fit(prior, self._memory), self._now, prior)
        return known
