"""Many Python integers as int32, quickly: token ids to hash, block ids to look up."""

import sys
from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MANY = 64


def int32_array(numbers: Sequence[int]) -> npt.NDArray[np.int32]:
    """Return `numbers` as int32, shape (n,). Raises OverflowError for one outside int32, TypeError for what is no integer."""
    return np.frombuffer(_array(numbers), np.int32)


def int32_bytes(numbers: Sequence[int]) -> bytes:
    """Return `numbers` as little-endian int32. Raises as `int32_array` does."""
    found = _array(numbers)
    if sys.byteorder == "big":
        found.byteswap()
    return found.tobytes()


def _array(numbers: Sequence[int]) -> "array[int]":
    """Return an array whose bytes are those of `numbers` as int32.

    CPython fills an array of unsigned integers in a third of the time that one of signed ones takes; as long as none is
    negative or too large, their bytes are the same.
    """
    if len(numbers) < _MANY:
        return array("i", numbers)
    try:
        found = array("I", numbers)
    except OverflowError:
        return array("i", numbers)
    return found if np.frombuffer(found, np.int32).min() >= 0 else array("i", numbers)
