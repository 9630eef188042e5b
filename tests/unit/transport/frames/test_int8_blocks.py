"""Blocks coded as host memory holds them are what the codec `int8` makes of them, and half as large."""

import numpy as np
import pytest

from tests.unit.transport.frames.blocks import NUMBERS, SHAPES, block
from transport.frames import int8_blocks, layouts
from transport.frames.errors import NotCoded
from transport.frames.lossy import INT8
from transport.frames.shape import Number


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
@pytest.mark.parametrize("kind", SHAPES)
def test_a_coded_block_is_the_codecs_payload_without_levels_and_comes_back_as_from_a_frame(kind, number):
    given = block(SHAPES[kind](number), 3)
    code = np.frombuffer(int8_blocks.encode(given.content, given.shape), np.uint8)
    payload = bytes(INT8.encode(given))
    assert len(code) == int8_blocks.coded_size(given.shape)
    assert int8_blocks.payload(code, given.shape).tobytes() == payload
    wanted, out = np.empty(given.shape.nbytes, np.uint8), np.empty(given.shape.nbytes, np.uint8)
    INT8.decode(memoryview(payload), given.shape, wanted)
    int8_blocks.decode(code, given.shape, out)
    assert (out == wanted).all()


def test_a_coded_block_of_the_8b_shape_takes_little_more_than_half_of_its_room():
    shape = layouts.attention(32, 8, 16, 128, Number.BFLOAT16)
    assert int8_blocks.coded_size(shape) / shape.nbytes == 0.5 + 1 / 128


def test_states_have_no_size_as_they_are_not_coded_and_numbers_that_are_not_finite_are_refused():
    assert int8_blocks.coded_size(layouts.state(2, 64)) == 0
    given = block(layouts.attention(1, 1, 16, 64, Number.FLOAT32))
    given.content[:4] = np.array([np.inf], np.float32).view(np.uint8)
    with pytest.raises(NotCoded):
        int8_blocks.encode(given.content, given.shape)
