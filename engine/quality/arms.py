"""What is compared: ways in which the KV of a prefix may come back, side by side in one batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.quality.coded_prefix import coded, floats
from engine.quality.dropping import kept
from engine.quality.scores import Noise
from transport.frames.codecs import named

REFERENCE = "raw"
NOISE_FLOOR = "noise floor"
DROPPED = "dropped"
RENUMBERED = "dropped, renumbered"
Bits = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Arm:
    """KV of a prefix (layers, heads, tokens, 2, dim) as bfloat16 bits; `stays` (tokens,) are what may be attended to.

    The first token behind the prefix has position `position`; `token_bytes` are those of a prefix token.
    """

    name: str
    bits: Bits
    stays: npt.NDArray[np.bool_]
    position: int
    token_bytes: float

    def equals(self, other: "Arm") -> bool:
        """Whether a model predicts the same with both, bit for bit."""
        same = self.position == other.position and np.array_equal(self.stays, other.stays)
        return same and np.array_equal(self.bits, other.bits)


@dataclass(slots=True)
class SignalToNoise:
    """Of an arm's keys and values."""

    keys: Noise = field(default_factory=Noise)
    values: Noise = field(default_factory=Noise)

    def add(self, true: Bits, found: Bits) -> None:
        """Take in a prefix."""
        for place, noise in ((0, self.keys), (1, self.values)):
            noise.add(floats(true[:, :, :, place]), floats(found[:, :, :, place]))


def arms(bits: Bits, again: Bits, attention: npt.NDArray[np.float64], codecs: Sequence[str], block_size: int) -> list[Arm]:
    """Return the arms of a prefix, the reference first: its KV `bits`, the same computed in pieces (`again`) and what attention
    each token got (tokens,)."""
    tokens = bits.shape[2]
    everything = np.ones(tokens, np.bool_)
    found = []
    for name in dict.fromkeys((REFERENCE, *codecs)):
        out = coded(named(name), bits, block_size)
        found.append(Arm(name, out.bits, everything, tokens, out.frame_bytes / tokens))
    raw_bytes = found[0].token_bytes
    found.append(Arm(NOISE_FLOOR, again, everything, tokens, raw_bytes))
    stays = kept(attention)
    share = float(stays.mean())
    found.append(Arm(DROPPED, bits, stays, tokens, raw_bytes * share))
    found.append(Arm(RENUMBERED, bits, stays, int(stays.sum()), raw_bytes * share))
    return found
