"""What imports take: a fixed time and a time per byte, per pair of replicas and per transport. Pure; times are in seconds.

What is not tried is not measured. So that a few slow imports do not end imports for ever, knowledge fades with time: a pair
that has not been used for a while is treated like the others, and a transport falls back to its prior.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp

from gateway.steering.costs.fitting import Fit
from gateway.steering.costs.priors import TRANSPORT_PRIORS

PAIR_SAMPLES_MIN = 3
"""With fewer transfers than this between two replicas, the average over all pairs of that transport is used."""
PAIRS_MAX = 4096
FADE_SECONDS = 1800.0
"""This long after the last import, 1/e of what was learnt about a transport is left, and nothing about a pair.

A few imports in that time are the cost of finding out that nothing has changed.
"""
FADE_STEP_SECONDS = 1.0

Pair = tuple[str, str, str]
"""Taker, source, transport; the former two are empty for all pairs of a transport."""


@dataclass(slots=True)
class _Known:
    """`terms` are the current coefficients."""

    fit: Fit
    used_at: float
    terms: tuple[float, ...]

    def holds(self, now: float) -> float:
        """Return the share of what was learnt that is still believed."""
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
        self._priors = dict(TRANSPORT_PRIORS)
        self._now = 0.0

    def pass_time(self, now: float) -> None:
        """Let what was learnt fade until `now`, on the same clock as `observe`. Cheap."""
        if now - self._now >= FADE_STEP_SECONDS:
            self._now = now
            for known in self._transports.values():
                known.terms = known.fit.faded(known.holds(now))

    def measured(self, transport: str, bytes_per_second: float) -> None:
        """A transport was measured before anything was imported by it: that is believed until something is, and again when
        what imports told has faded."""
        fixed, a_byte = self._priors[transport]
        if bytes_per_second > 0 and a_byte != 1 / bytes_per_second:
            prior = self._priors[transport] = (fixed, 1 / bytes_per_second)
            known = self._transports.get(transport)
            if known is not None and known.fit.samples:
                known.fit.rebase(prior)
            elif known is not None:
                del self._transports[transport]

    def terms(self, taker: str, source: str, transport: str) -> tuple[float, float]:
        """Return the seconds per import and per byte of it, while no other import uses these replicas."""
        known = self._pair((taker, source, transport))
        if known is None or known.fit.samples < PAIR_SAMPLES_MIN:
            known = self._transport(transport)
        fixed, a_byte = known.terms
        return fixed, a_byte

    def observe(self, pair: Pair, kv_bytes: float, seconds: float, now: float) -> None:
        """Learn that an import took `seconds`. `kv_bytes` count once for each import that shared the link with it."""
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
        """Return every fit in use with its terms: transports, then pairs."""
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
            prior = self._priors.get(transport, TRANSPORT_PRIORS["rdma"])
            known = self._transports[transport] = _Known(Fit(prior, self._memory), self._now, prior)
        return known
