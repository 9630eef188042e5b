"""NeuroKV's policy, which drops tokens of a prefix: a reference to compare codecs with, never done by peerkv.

It keeps the first token, the last ones, and those that get most attention in the last layer. In an engine with paged memory a
hole moves what is behind it to other positions, unless each kernel is told otherwise: hence two arms, with positions kept and
renumbered. Source: README of github.com/Umang-projects/NeuroKV, phase 1, whose 64 tokens "in the middle" are kept whole here.
"""

import numpy as np
import numpy.typing as npt

FIRST = 1
LAST_SHARE = 256 / 512
HEAVY_SHARE = (32 + 64) / 512
"""Shares of a prefix: of 512 tokens NeuroKV keeps 353."""


def kept(attention: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return which tokens of a prefix stay, by how much attention each got (tokens,) from all heads and queries."""
    tokens = len(attention)
    stays = np.zeros(tokens, np.bool_)
    stays[:FIRST] = True
    stays[tokens - round(tokens * LAST_SHARE) :] = True
    others = np.flatnonzero(~stays)
    stays[others[np.argsort(-attention[others], kind="stable")[: round(tokens * HEAVY_SHARE)]]] = True
    return stays
