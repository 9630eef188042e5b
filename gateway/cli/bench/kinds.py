"""Where a request's prompt came from, and one measured request."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.cli.bench.spread import Spread, spread

BLOCKS_LEFT_MAX = 2
"""Blocks at a prompt's end that no cache supplies: the partial one and that of the last token, which is always computed."""


class Kind(enum.StrEnum):
    """Where the KV of a prompt came from."""

    COLD = "cold"
    IMPORT = "import"
    LOCAL = "local hit"


@dataclass(frozen=True, slots=True)
class Sample:
    """One request on `replica`: the intended kind, the actual kind (None: something in between), and its time in seconds."""

    tokens: int
    wanted: Kind
    got: Kind | None
    replica: str
    prompt_tokens: int
    local_tokens: int
    peer_tokens: int
    first_seconds: float

    @property
    def good(self) -> bool:
        """Whether the actual kind is the intended one."""
        return self.wanted is self.got


def kind_of(prompt_tokens: int, local_tokens: int, peer_tokens: int, block_size: int) -> Kind | None:
    """Cold: nothing came from a cache. Import: all that can, some of it from another replica. Local hit: all from its own."""
    cached = local_tokens + peer_tokens
    if cached == 0:
        return Kind.COLD
    if prompt_tokens - cached > BLOCKS_LEFT_MAX * block_size:
        return None
    return Kind.IMPORT if peer_tokens > 0 else Kind.LOCAL


@dataclass(frozen=True, slots=True)
class Row:
    """The times of one prompt length by kind, in seconds; kinds that never occurred are missing."""

    tokens: int
    prompt_tokens: int
    seconds: Mapping[Kind, Spread]

    def ratio(self, above: Kind, below: Kind) -> float | None:
        """Return the ratio of one kind's median to another's."""
        if above in self.seconds and below in self.seconds:
            return self.seconds[above].median / self.seconds[below].median
        return None


def rows(samples: Sequence[Sample]) -> list[Row]:
    """Return a row per length, from the samples whose kind was the intended one."""
    found = []
    for tokens in sorted({sample.tokens for sample in samples}):
        mine = [sample for sample in samples if sample.tokens == tokens]
        by_kind = {kind: spread([s.first_seconds for s in mine if s.good and s.got is kind]) for kind in Kind}
        middle = sorted(sample.prompt_tokens for sample in mine)[len(mine) // 2]
        found.append(Row(tokens, middle, {kind: each for kind, each in by_kind.items() if each is not None}))
    return found
