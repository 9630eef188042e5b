"""A robust online linear fit: non-negative coefficients, relative errors, old samples fade.

Each sample is `y ≈ Σ x_j·c_j`. It minimises the relative error, because 10 ms matter at 30 ms and not at 10 s. A sample with
an unusual error counts less (Huber), unless all samples err to one side: then what is measured has changed, and the past fades
fast. Coefficients that the samples say nothing about stay where they were.
"""

from collections.abc import Sequence
from math import inf, log

HUBER = 1.5
"""Errors beyond this multiple of the usual one count linearly: Huber's choice, which loses 5 % on normal errors."""
USUAL_SHARE = 0.05
"""Weight of the newest sample in the usual error."""
STAY = 0.01
"""How firmly a coefficient stays at its value, in samples that it alone explains."""
STREAK = 12
"""This many consecutive errors to one side are not chance (1 in 2,048)."""
STREAK_FADE = 0.85
SWEEPS = 12
WARM_UP = 64
"""The first samples are solved one by one, later ones in groups of `SOLVE_EVERY`."""
SOLVE_EVERY = 8
_SECONDS_MIN = 1e-9


class Fit:
    """Non-negative coefficients, starting from `prior`, all above 0; a sample has faded to 1/e after `memory` further ones.

    None exceeds `factors_max` times its prior: if two terms always occur together, the samples cannot tell which of them
    takes the time, and one that is known to be small must not get all of it.
    """

    __slots__ = ("_a", "_b", "_memory", "_most", "_scale", "_streak", "_unsolved", "_usual", "_z", "coefficients", "samples")

    def __init__(self, prior: Sequence[float], memory: int, factors_max: Sequence[float] = ()) -> None:
        if min(prior) <= 0:
            raise ValueError("a prior has to be above 0")
        size = len(prior)
        self._memory = memory
        self._most = tuple(factors_max) or (inf,) * size
        self._scale = tuple(prior)
        self._z = [1.0] * size  # the coefficients in units of the prior
        self._a = [[0.0] * size for _ in range(size)]
        self._b = [0.0] * size
        self._usual = 1.0
        self._streak = 0  # errors in a row to one side, below 0 if the samples are smaller
        self._unsolved = 0
        self.samples = 0
        self.coefficients = tuple(prior)
        """The current coefficients, in the order of the prior."""

    @property
    def usual_error(self) -> float:
        """The running mean of the relative error, 1.0 before there were samples."""
        return self._usual

    def predict(self, x: Sequence[float]) -> float:
        """Return what the fit expects for `x`."""
        return sum(value * coefficient for value, coefficient in zip(x, self.coefficients, strict=True))

    def observe(self, x: Sequence[float], y: float, holds: float = 1.0) -> None:
        """Learn that `x` gave `y` above 0; `x` has no negative number.

        `holds` is the share of old knowledge that is still believed. The sample decides: if it is unusual for the fit and
        closer to what `faded` expects, the rest is forgotten.
        """
        y = max(y, _SECONDS_MIN)
        u = [value * scale for value, scale in zip(x, self._scale, strict=True)]
        if holds < 1:
            self._doubt(u, y, holds)
        expected = _expected(u, self._z)
        # relative to what was expected, so that noise in y causes no bias; a prior far too low must not dominate for long
        weight = 1 / max(expected, y / 4) ** 2
        error = abs(y - expected) * weight**0.5
        limit = HUBER * self._usual
        self._streak = max(1, self._streak + 1) if y > expected else min(-1, self._streak - 1)
        changed = abs(self._streak) >= STREAK
        if error > limit and not changed:
            weight *= limit / error
        self.samples += 1
        self._usual += max(USUAL_SHARE, 1 / (self.samples + 1)) * (min(error, 2 * limit) - self._usual)
        fade = STREAK_FADE if changed else 1 - 1 / min(self._memory, self.samples + 8)
        for j, (row, value) in enumerate(zip(self._a, u, strict=True)):
            factor = weight * value
            self._b[j] = fade * self._b[j] + factor * y
            for k, other in enumerate(u):
                row[k] = fade * row[k] + factor * other
        self._unsolved += 1
        if self.samples <= WARM_UP or self._unsolved >= SOLVE_EVERY:
            self._solve()

    def rebase(self, prior: Sequence[float]) -> None:
        """Begin from another prior, all above 0: what was learnt stays, and fades to that."""
        ratios = [new / old for new, old in zip(prior, self._scale, strict=True)]
        self._scale = tuple(prior)
        self._z = [value / ratio for value, ratio in zip(self._z, ratios, strict=True)]
        self._a = [
            [value * own * other for value, other in zip(row, ratios, strict=True)]
            for row, own in zip(self._a, ratios, strict=True)
        ]
        self._b = [value * ratio for value, ratio in zip(self._b, ratios, strict=True)]

    def faded(self, share: float) -> tuple[float, ...]:
        """Return the coefficients if only `share`, 0 to 1, of what was learnt still holds: part of the way back to the prior.

        Large ones shrink by their ratio to it, so that one that is 100 times too large does not take 100 times as long.
        """
        return tuple(scale * value for scale, value in zip(self._scale, self._faded(share), strict=True))

    def _faded(self, share: float) -> list[float]:
        return [value**share if value > 1 else 1 - share * (1 - value) for value in self._z]

    def _doubt(self, u: Sequence[float], y: float, share: float) -> None:
        """Forget all but `share` of what was learnt, if the sample suggests it."""
        faded = self._faded(share)
        off, off_if_faded = (abs(log(y / max(_expected(u, z), _SECONDS_MIN))) for z in (self._z, faded))
        if off <= log(1 + HUBER * self._usual) or off_if_faded >= off:
            return
        self._z = faded
        self._a = [[share * value for value in row] for row in self._a]
        # the remaining samples support the current coefficients
        self._b = [sum(value * other for value, other in zip(row, self._z, strict=True)) for row in self._a]

    def _solve(self) -> None:
        """Coordinate descent from the last solution, to which the coefficients are also drawn."""
        z = self._z
        stay = [STAY / max(1.0, value) ** 2 for value in z]
        drawn = [weight * value for weight, value in zip(stay, z, strict=True)]
        for _ in range(SWEEPS):
            for j, row in enumerate(self._a):
                pull = self._b[j] + drawn[j] + row[j] * z[j]
                for value, other in zip(row, z, strict=True):
                    pull -= value * other
                z[j] = min(max(0.0, pull / (row[j] + stay[j])), self._most[j])
        self._unsolved = 0
        self.coefficients = tuple(scale * value for scale, value in zip(self._scale, z, strict=True))


def _expected(u: Sequence[float], z: Sequence[float]) -> float:
    return sum(value * other for value, other in zip(u, z, strict=True))
