"""Numbers as int32: the same bytes, or a refusal, however many there are."""

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from transport.int32 import int32_array, int32_bytes


@pytest.mark.parametrize("bad", [2**31, 2**32 - 1, 2**32, -(2**31) - 1])
def test_a_number_outside_int32_is_refused(bad):
    for ids in ([bad] * 8, [*range(99), bad], [*range(-99, 0), bad]):
        with pytest.raises(OverflowError):
            int32_bytes(ids)


@pytest.mark.parametrize("bad", [1.0, "1", None])
def test_what_is_no_integer_is_refused(bad):
    with pytest.raises(TypeError):
        int32_bytes([1, bad])
    with pytest.raises(TypeError):
        int32_bytes([*range(99), bad])


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=99))
@example([2**31 - 1] * 99)
@example([-1, *range(99)])
def test_many_and_few_numbers_are_the_same_int32(ids):
    assert int32_bytes(ids) == struct.pack(f"<{len(ids)}i", *ids)
    assert int32_array(ids).tolist() == ids
