"""Every codec keeps the same contract: what comes out is what went in, or as near to it as the codec says, or an error."""

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest

from tests.unit.transport.frames.blocks import NUMBERS, SHAPES, block, decoded, floats, signal_to_noise
from transport.frames import codecs, int8_kernels, layouts, rotation_kernels
from transport.frames.codec import Block, Quality
from transport.frames.errors import FrameDamaged, FrameNotRead, NotCoded
from transport.frames.rows import _LEVELS
from transport.frames.shape import Number

LOSSLESS = tuple(name for name in codecs.NAMES if codecs.named(name).quality is Quality.EXACT)
LOSSY = tuple(name for name in codecs.NAMES if codecs.named(name).quality is Quality.LOSSY)
DECIBELS_MIN = {"int8": 40.0, "rot4": 19.0, "rot3": 13.5, "mix": 13.5, "neurokv": 40.0}  # of a sequence's last block
BITS_MAX = {"int8": 8.6, "rot4": 4.6, "rot3": 3.6, "mix": 4.6, "neurokv": 8.6}

every_codec = pytest.mark.parametrize("codec", [codecs.named(name) for name in codecs.NAMES], ids=codecs.NAMES)
lossy_codecs = pytest.mark.parametrize("codec", [codecs.named(name) for name in LOSSY], ids=LOSSY)
every_number = pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@every_shape
@every_number
@every_codec
def test_what_comes_out_is_what_went_in_or_as_near_as_the_codec_says(codec, number, shape):
    given = block(shape(number), position=64)
    out = decoded(codec, given)
    if codec.quality is Quality.EXACT:
        assert out.tobytes() == given.content.tobytes()
    else:
        assert signal_to_noise(given.content, out, number) > DECIBELS_MIN[codec.name]


@every_codec
def test_equal_blocks_have_equal_payloads_from_any_number_of_threads(codec):
    given = [block(SHAPES["attention"](Number.BFLOAT16), seed=seed % 3) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        payloads = list(pool.map(lambda each: bytes(codec.encode(each)), given))
    assert [len(set(payloads[seed::3])) for seed in range(3)] == [1, 1, 1]


@every_number
@every_codec
def test_zeros_stay_zeros(codec, number):
    shape = SHAPES["attention"](number)
    given = Block(shape, np.zeros(shape.nbytes, np.uint8), 64)
    assert not floats(decoded(codec, given), number).any()


@every_number
@every_codec
def test_numbers_of_any_size_are_kept_in_proportion(codec, number):
    scale = {Number.FLOAT16: 8000.0}.get(number, 1e12)
    given = block(SHAPES["attention"](number), position=64, scale=scale)
    out = decoded(codec, given)
    assert np.isfinite(floats(out, number)).all()
    assert codec.quality is Quality.EXACT or signal_to_noise(given.content, out, number) > DECIBELS_MIN[codec.name]


@every_codec
@pytest.mark.parametrize("name", ["attention", "latents", "attention of the CPU"])
def test_any_other_length_of_a_payload_is_damage(codec, name):
    given = block(SHAPES[name](Number.BFLOAT16))
    payload, out = bytes(codec.encode(given)), np.empty(given.shape.nbytes, np.uint8)
    for length in sorted({0, 1, 7, len(payload) // 2, len(payload) - 1}):
        with pytest.raises(FrameDamaged):
            codec.decode(memoryview(payload[:length]), given.shape, out)
    with pytest.raises(FrameDamaged):
        codec.decode(memoryview(payload + b"\0"), given.shape, out)


@every_codec
def test_a_payload_of_noise_is_damage_or_some_block_but_never_anything_else(codec):
    shape = SHAPES["attention"](Number.BFLOAT16)
    good, source = bytes(codec.encode(block(shape))), np.random.default_rng(5)
    out = np.empty(shape.nbytes, np.uint8)
    for _ in range(60):
        payload = bytearray(good)
        for place in source.integers(0, len(payload), 8):
            payload[place] = int(source.integers(256))
        payload[: source.integers(1, 24)] = source.bytes(int(source.integers(1, 24)))
        try:
            codec.decode(memoryview(bytes(payload)), shape, out)
        except FrameDamaged:
            continue


def test_zstd_that_would_fill_memory_is_damage():
    shape = layouts.state(1, 1000)
    bomb = bytes(codecs.named("raw-z").encode(Block(layouts.state(1, 50_000_000), np.zeros(50_000_000, np.uint8))))
    assert len(bomb) < 100_000
    with pytest.raises(FrameDamaged, match="or more"):
        codecs.named("raw-z").decode(memoryview(bomb), shape, np.empty(1000, np.uint8))


@lossy_codecs
@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0], ids=["infinity", "minus infinity", "not a number"])
def test_values_that_are_not_finite_are_not_coded_with_loss(codec, bits):
    given = block(SHAPES["attention"](Number.BFLOAT16), position=64)
    content = given.content.copy()
    content.view(np.uint16)[777] = bits
    with pytest.raises(NotCoded, match="finite"):
        codec.encode(Block(given.shape, content, 64))


@lossy_codecs
@pytest.mark.parametrize("shape", [layouts.state(2, 100, Number.FLOAT32), layouts.opaque((64, 64, 32))])
def test_states_and_quantised_caches_are_not_coded_with_loss(codec, shape):
    with pytest.raises(NotCoded, match="raw-z"):
        codec.encode(Block(shape, np.zeros(shape.nbytes, np.uint8)))
    with pytest.raises(FrameDamaged):
        codec.decode(memoryview(b"\0" * 100), shape, np.empty(shape.nbytes, np.uint8))


@pytest.mark.parametrize("name", LOSSLESS)
def test_states_and_quantised_caches_come_back_from_lossless_codecs(name):
    for shape in (layouts.state(2, 101, Number.FLOAT32), layouts.opaque((63, 63, 31))):
        content = np.random.default_rng(1).integers(0, 256, shape.nbytes, np.uint8)
        assert (decoded(codecs.named(name), Block(shape, content)) == content).all()


@lossy_codecs
def test_a_block_takes_the_room_that_the_codec_says(codec):
    given = block(layouts.attention(4, 4, 16, 64, Number.BFLOAT16), position=64, behind=1000)
    assert len(codec.encode(given)) * 8 / (given.shape.nbytes / 2) < BITS_MAX[codec.name]


@lossy_codecs
def test_what_is_compiled_at_the_start_is_all_that_blocks_need(codec, monkeypatch):
    used: list[tuple[object, ...]] = []

    def noted(kernel):
        return lambda *given: used.append((kernel, *map(numba.typeof, given))) or kernel(*given)

    for module, names in ((int8_kernels, ("quantise", "restore")), (rotation_kernels, ("rotate", "rotate_back"))):
        for name in names:
            monkeypatch.setattr(module, name, noted(getattr(module, name)))
    codecs.compile_codec(codec.name)
    compiled = set(used)
    used.clear()
    for number in NUMBERS:
        for shape in SHAPES.values():
            for position in (0, 64):
                given = block(shape(number), position=position)
                frame = memoryview(bytearray(codec.encode(given)))  # as it comes from a socket
                codec.decode(frame, given.shape, np.empty(given.shape.nbytes, np.uint8))
    assert compiled == set(used)


def test_byte_planes_of_normal_numbers_take_seven_tenths_of_their_room():
    given = block(layouts.attention(16, 4, 16, 64, Number.BFLOAT16))
    assert len(codecs.named("raw-z").encode(given)) < 0.7 * given.shape.nbytes


@every_number
def test_int8_is_off_by_half_a_step_at_most(number):
    given = block(SHAPES["attention"](number))
    rows, out = (floats(each, number).reshape(-1, 64) for each in (given.content, decoded(codecs.named("int8"), given)))
    step = np.abs(rows).max(axis=1, keepdims=True) / 127 * 1.01
    assert (np.abs(rows - out) <= step / 2 + np.abs(rows) * 2.0**-8).all()


@pytest.mark.parametrize("name", ["rot4", "rot3", "mix"])
def test_the_first_tokens_of_a_sequence_are_kept_as_they_are(name):
    shape = layouts.attention(2, 2, 16, 64, Number.BFLOAT16)
    for position, kept in ((0, 4), (2, 2), (4, 0), (1600, 0)):
        given = block(shape, position=position)
        same = given.content.reshape(2, 2, 16, 256) == decoded(codecs.named(name), given).reshape(2, 2, 16, 256)
        assert np.flatnonzero(same.all(axis=(0, 1, 3))).tolist() == list(range(kept))


def test_mix_keeps_the_last_tokens_and_those_whose_keys_stand_out_better():
    shape = layouts.attention(2, 2, 16, 64, Number.FLOAT32)
    values = np.random.default_rng(3).standard_normal((2, 2, 16, 2, 64)).astype(np.float32)
    values[:, :, :, 0] += 3.0
    values[:, :, 9, 0] *= -1.0
    given = Block(shape, values.reshape(-1).view(np.uint8).copy(), 64, 60)
    error = (floats(decoded(codecs.named("mix"), given), Number.FLOAT32).reshape(values.shape) - values) ** 2
    noise = error.mean(axis=(0, 1, 3, 4))
    assert set(np.argsort(noise)[:6].tolist()) >= {9, 12, 13, 14, 15}
    assert noise[[9, 12, 13, 14, 15]].max() * 20 < np.median(noise)


def test_neurokv_keeps_the_first_token_the_last_half_and_the_heaviest_of_the_rest_and_little_of_the_others():
    shape = layouts.attention(2, 2, 16, 64, Number.FLOAT32)
    values = np.random.default_rng(3).standard_normal((2, 2, 16, 2, 64)).astype(np.float32)
    values[:, :, :, 0] += 3.0
    values[:, :, [3, 9, 12], 0] *= -1.0

    def precise(position, behind):
        given = Block(shape, values.reshape(-1).view(np.uint8).copy(), position, behind)
        error = (floats(decoded(codecs.named("neurokv"), given), Number.FLOAT32).reshape(values.shape) - values) ** 2
        noise = error.mean(axis=(0, 1, 3, 4))
        kept = np.flatnonzero(noise < 0.002).tolist()
        assert noise[noise >= 0.002].min(initial=1.0) > 0.05  # 2 bits
        return kept

    assert precise(64, 432) == [3, 9, 12]  # 96 of 512: three of sixteen
    assert precise(0, 496) == [0, 3, 9, 12]
    middle = precise(248, 248)  # of which the last half begins in the block
    assert {3, *range(8, 16)} <= set(middle)
    assert len(middle) == 8 + 3
    assert precise(496, 0) == list(range(16))
    payloads = [codecs.named("neurokv").encode(Block(shape, values.reshape(-1).view(np.uint8).copy(), 64, 432)) for _ in "ab"]
    assert payloads[0] == payloads[1]
    assert 8 * len(payloads[0]) / values.size < 4.0  # 2 bits, and 8 of three sixteenths


def test_a_codec_that_is_not_known_is_not_read():
    with pytest.raises(FrameNotRead, match="codec 99"):
        codecs.numbered(99)
    assert [codecs.numbered(number).name for number in range(len(codecs.NAMES))] == list(codecs.NAMES)
    assert [codecs.named(name).number for name in codecs.NAMES] == list(range(len(codecs.NAMES)))


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_codebook_is_the_best_one_for_normal_numbers(bits):
    levels = np.array(_LEVELS[bits])
    values = np.abs(np.random.default_rng(0).standard_normal(2_000_000))
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
    means = [values[nearest == level].mean() for level in range(len(levels))]
    assert np.allclose(means, levels, rtol=0.01)


@pytest.mark.parametrize(
    "loop", [int8_kernels.quantise, int8_kernels.restore, rotation_kernels.rotate, rotation_kernels.rotate_back]
)
def test_loops_let_go_of_the_interpreter_and_raise_nothing(loop):
    assert loop.targetoptions["nogil"]
    assert not loop.targetoptions.get("parallel")
    assert loop.targetoptions["error_model"] == "numpy"
