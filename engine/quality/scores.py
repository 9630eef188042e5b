"""Figures from predictions: how far one distribution is from another, and how sure a mean is. Plain numpy."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BOOTSTRAPS = 2000
SEED = 0
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Predicted:
    """What was predicted for each scored token of one document, (tokens,) each: the divergence from the reference, whether the
    likeliest token is the reference's, and the negative logarithm of the true token's probability. Natural logarithms."""

    divergence: Floats
    agrees: npt.NDArray[np.bool_]
    loss: Floats


def compare(reference: Floats, other: Floats, tokens: npt.NDArray[np.int64]) -> Predicted:
    """Return how `other` predicts `tokens` (n,) beside `reference`; both are log-probabilities (n, vocabulary)."""
    divergence = (np.exp(reference) * (reference - other)).sum(axis=1, dtype=np.float64)
    agrees = reference.argmax(axis=1) == other.argmax(axis=1)
    loss = -other[np.arange(len(tokens)), tokens]
    return Predicted(np.maximum(divergence, 0).astype(np.float32), agrees, loss)


def perplexity_change(losses: list[Floats], references: list[Floats]) -> tuple[float, float, float]:
    """Return the relative change of perplexity and its interval of 95 %, by drawing documents (items) anew."""
    differences = np.array([float(np.mean(ours - theirs)) for ours, theirs in zip(losses, references, strict=True)])
    drawn = np.random.default_rng(SEED).integers(0, len(differences), (BOOTSTRAPS, len(differences)))
    low, high = np.percentile(differences[drawn].mean(axis=1), [2.5, 97.5])
    return float(np.expm1(differences.mean())), float(np.expm1(low)), float(np.expm1(high))


def first_difference(ours: npt.NDArray[np.int64], theirs: npt.NDArray[np.int64]) -> int:
    """Return how many tokens are equal from the start on."""
    different = np.flatnonzero(ours != theirs)
    return int(different[0]) if len(different) else len(ours)


@dataclass(slots=True)
class Noise:
    """Signal and noise energy, added up over documents."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, true: Floats, coded: Floats) -> None:
        """Take in numbers and what became of them."""
        self.signal += float(np.sum(np.square(true, dtype=np.float64)))
        self.noise += float(np.sum(np.square(true.astype(np.float64) - coded)))

    @property
    def decibels(self) -> float | None:
        """Ten times the logarithm of signal to noise; None if there is no noise."""
        return float(10 * np.log10(self.signal / self.noise)) if self.noise else None
