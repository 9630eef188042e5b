"""The comparison: documents one after the other, all arms side by side, and a row of figures for each arm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine.quality.arms import DROPPED, NOISE_FLOOR, REFERENCE, RENUMBERED, Arm, SignalToNoise, arms
from engine.quality.errors import QualityNotMeasured
from engine.quality.results import Given, Row
from engine.quality.scores import Predicted, compare, first_difference, perplexity_change
from transport.frames.codecs import NAMES, named

Tokens = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint16]
Step = Callable[[str], None]


class Predicts(Protocol):
    """What is asked of a model (`model.Model`)."""

    def prefix(self, tokens: Tokens) -> tuple[Bits, npt.NDArray[np.float64]]: ...

    def prefix_in_pieces(self, tokens: Tokens) -> Bits: ...

    def follow(self, arms: Sequence[Arm], last: int, given: Tokens) -> npt.NDArray[np.float32]: ...

    def continue_greedily(self, arms: Sequence[Arm], last: int, count: int) -> Tokens: ...


@dataclass(slots=True)
class _Seen:
    token_bytes: list[float] = field(default_factory=list)
    predicted: list[Predicted] = field(default_factory=list)
    equal_tokens: list[int] = field(default_factory=list)
    noise: SignalToNoise = field(default_factory=SignalToNoise)


STEPS_EACH = 4
"""Steps of progress for a document."""


def compared(model: Predicts, documents: Sequence[Tokens], given: Given, step: Step = lambda words: None) -> list[Row]:
    """Return a row for each arm. `step` is called STEPS_EACH times a document, before each part of its work.

    A document's first `given.prefix_tokens` are the prefix, of which the last token is asked anew; then come those that are
    scored. Raises QualityNotMeasured if none is long enough.
    """
    seen: dict[str, _Seen] = {}
    for number, tokens in enumerate(documents, start=1):
        step(f"document {number}: prefix")
        prefix, last = tokens[: given.prefix_tokens], int(tokens[given.prefix_tokens])
        bits, attention = model.prefix(prefix)
        again = model.prefix_in_pieces(prefix)
        step(f"document {number}: frames")
        found = arms(bits, again, attention, given.codecs, given.block_size)
        asked, places = _different(found)
        step(f"document {number}: predictions")
        scored = tokens[given.prefix_tokens + 1 :][: given.scored_tokens]
        chances = model.follow(asked, last, scored)
        step(f"document {number}: greedy answers")
        answers = model.continue_greedily(asked, last, given.greedy_tokens)
        for place, arm in zip(places, found, strict=True):
            into = seen.setdefault(arm.name, _Seen())
            into.token_bytes.append(arm.token_bytes)
            into.predicted.append(compare(chances[0], chances[place], scored))
            into.equal_tokens.append(first_difference(answers[0], answers[place]))
            into.noise.add(bits, arm.bits)
    if not seen:
        raise QualityNotMeasured(f"no text of {given.prefix_tokens + given.scored_tokens + 1} tokens or more")
    return [_row(name, found, seen[REFERENCE]) for name, found in seen.items()]


def _different(found: Sequence[Arm]) -> tuple[list[Arm], list[int]]:
    """Return the arms that differ, and for each of all its place among them: what is bit for bit equal is asked once."""
    asked: list[Arm] = []
    places = []
    for arm in found:
        same = (place for place, other in enumerate(asked) if other.equals(arm))
        places.append(next(same, len(asked)))
        if places[-1] == len(asked):
            asked.append(arm)
    return asked, places


def _row(name: str, found: _Seen, reference: _Seen) -> Row:
    divergence = np.concatenate([each.divergence for each in found.predicted])
    losses, references = ([each.loss for each in of.predicted] for of in (found, reference))
    change, low, high = perplexity_change(losses, references)
    return Row(
        name=name,
        quality=named(name).quality.name.lower() if name in NAMES else {NOISE_FLOOR: "exact"}.get(name, "lossy"),
        token_bytes=float(np.mean(found.token_bytes)),
        divergence_mean=float(divergence.mean()),
        divergence_p99=float(np.percentile(divergence, 99)),
        agreement=float(np.concatenate([each.agrees for each in found.predicted]).mean()),
        perplexity=float(np.exp(np.mean([each.mean() for each in losses]))),
        perplexity_change=change,
        perplexity_change_low=low,
        perplexity_change_high=high,
        equal_tokens=float(np.median(found.equal_tokens)),
        keys_decibels=None if name in (DROPPED, RENUMBERED) else found.noise.keys.decibels,
        values_decibels=None if name in (DROPPED, RENUMBERED) else found.noise.values.decibels,
    )
