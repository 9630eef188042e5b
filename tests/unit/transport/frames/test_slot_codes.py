"""Blocks coded as host memory holds them are what the codec makes of them, and half as large by int8, and less by others."""

import numpy as np
import pytest

from tests.unit.transport.frames.blocks import NUMBERS, SHAPES, block
from transport.frames import layouts, slot_codes
from transport.frames.codec import Block
from transport.frames.codecs import named
from transport.frames.errors import NotCoded
from transport.frames.shape import Number


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("codec", ["int8", "rot4", "rot3"])
def test_a_coded_block_is_the_codecs_payload_without_levels_and_comes_back_as_from_a_frame(codec, kind, number):
    given = block(SHAPES[kind](number), 3)
    given = Block(given.shape, given.content, position=given.shape.tokens)
    code = np.frombuffer(slot_codes.encode(codec, given.content, given.shape), np.uint8)
    payload = bytes(named(codec).encode(given))
    assert len(code) == slot_codes.coded_size(codec, given.shape)
    assert slot_codes.payload(codec, code, given.shape).tobytes() == payload
    wanted, out = np.empty(given.shape.nbytes, np.uint8), np.empty(given.shape.nbytes, np.uint8)
    named(codec).decode(memoryview(payload), given.shape, wanted)
    slot_codes.decode(codec, code, given.shape, out)
    assert (out == wanted).all()


def test_a_coded_block_of_the_8b_shape_takes_little_more_than_half_of_its_room():
    shape = layouts.attention(32, 8, 16, 128, Number.BFLOAT16)
    assert slot_codes.coded_size("int8", shape) / shape.nbytes == 0.5 + 1 / 128
    assert slot_codes.coded_size("rot4", shape) / shape.nbytes == 0.25 + 1 / 128
    assert slot_codes.coded_size("rot3", shape) / shape.nbytes == 3 / 16 + 1 / 128


def test_states_have_no_size_as_they_are_not_coded_and_numbers_that_are_not_finite_are_refused():
    assert slot_codes.coded_size("int8", layouts.state(2, 64)) == 0
    given = block(layouts.attention(1, 1, 16, 64, Number.FLOAT32))
    given.content[:4] = np.array([np.inf], np.float32).view(np.uint8)
    with pytest.raises(NotCoded):
        slot_codes.encode("int8", given.content, given.shape)
