"""Which tokens of a block matter, from their keys alone: attention weights are not there to be asked.

A key that points elsewhere than the mean key is attended to more. Source: KeyDiff (arXiv 2504.15364), within a block.
"""

import numpy as np
import numpy.typing as npt

from transport.frames.codec import Block
from transport.frames.shape import Axis, Number, Role, by_token


def key_scores(block: Block) -> npt.NDArray[np.float32]:
    """Return the importance of each token (tokens,): minus the cosine to the mean key, over all layers and heads."""
    scores, rows = np.zeros(block.shape.tokens, np.float32), 0
    for part, piece in block.shape.pieces(block.content):
        if part.role in (Role.VALUES, Role.STATE):
            continue
        numbers = by_token(part, piece)
        keys = numbers[0] if part.role is Role.PAIRS else numbers
        found = _floats(keys.reshape(-1, block.shape.tokens, part.count(Axis.DIM)), part.number)
        with np.errstate(all="ignore"):  # what is not finite is refused when it is coded
            units = found / np.maximum(np.linalg.norm(found, axis=2, keepdims=True), 1e-20)
            mean = found.mean(axis=1, keepdims=True)
            mean /= np.maximum(np.linalg.norm(mean, axis=2, keepdims=True), 1e-20)
            scores -= (units * mean).sum(axis=(0, 2))
        rows += len(found)
    return scores / np.float32(max(1, rows))


def _floats(numbers: npt.NDArray[np.generic], number: Number) -> npt.NDArray[np.float32]:
    """Return numbers, as `by_token` has them, as float32."""
    if number is Number.BFLOAT16:
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    if number is Number.FLOAT32:
        return np.ascontiguousarray(numbers).view(np.float32)
    return numbers.astype(np.float32)
