"""Of a frame nothing is believed: each flipped byte and each truncation is a named error, and so is anything foreign."""

import random
import struct

import numpy as np
import pytest
import xxhash

from tests.unit.transport.frames.blocks import block
from transport.frames import codecs, layouts
from transport.frames.codec import Quality
from transport.frames.errors import ForeignFrame, FrameDamaged, FrameError, FrameLocked, FrameNotRead
from transport.frames.frame import HEADER_BYTES, frame_bytes, read_header, read_into, write
from transport.frames.shape import Number

FINGERPRINT, KEY, SECRET = b"f" * 16, b"k" * 16, b"s" * 32
SHAPE = layouts.attention(1, 2, 4, 16, Number.BFLOAT16)
every_codec = pytest.mark.parametrize("name", codecs.NAMES)


def frame(name="raw", secret=None, **changed):
    asked = {"fingerprint": FINGERPRINT, "key": KEY, "group": 3, "secret": secret} | changed
    return write(codecs.named(name), block(SHAPE, position=8), **asked)


def read(data, secret=None, **changed):
    out = np.zeros(SHAPE.nbytes, np.uint8)
    asked = {"fingerprint": FINGERPRINT, "key": KEY, "group": 3, "shape": SHAPE, "secret": secret} | changed
    return read_into(out, data, **asked), out


def signed(data):
    """Give changed bytes the checksum of whoever wants them believed."""
    return data[:-16] + xxhash.xxh3_128_digest(data[:-16])


@every_codec
@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "encrypted"])
def test_a_frame_gives_its_block_and_says_what_it_is(name, secret):
    data = frame(name, secret)
    header, out = read(data, secret)
    assert (header.codec.name, header.group, header.position, header.key) == (name, 3, 8, KEY)
    assert header.shape == SHAPE
    assert header.quality is codecs.named(name).quality
    assert frame_bytes(data[:HEADER_BYTES]) == len(data)
    if header.quality is Quality.EXACT:
        assert (out == block(SHAPE).content).all()


@every_codec
@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "encrypted"])
def test_every_flipped_byte_is_an_error(name, secret):
    data = frame(name, secret)
    for place in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[place] ^= flip
            with pytest.raises(FrameError):
                read(bytes(changed), secret)


@every_codec
def test_every_truncation_is_damage(name):
    data = frame(name)
    for length in range(len(data)):
        with pytest.raises(FrameDamaged):
            read(data[:length])
    with pytest.raises(FrameDamaged):
        read(data + b"\0")


@every_codec
def test_headers_that_lie_with_a_good_checksum_are_errors_or_a_block_but_never_anything_else(name):
    data, source = frame(name), random.Random(7)
    for _ in range(800):
        changed = bytearray(data)
        for _ in range(source.randint(1, 3)):
            changed[source.randrange(HEADER_BYTES + len(SHAPE.packed) + 8)] = source.choice((0, 1, 2, 3, 127, 128, 255))
        for reader in (read, read_header):
            try:
                reader(signed(bytes(changed)))
            except FrameError:
                continue


def test_lengths_are_refused_before_anything_is_allocated():
    data = bytearray(frame())
    data[52:60] = struct.pack("<Q", 1 << 60)
    with pytest.raises(FrameDamaged, match="payload of"):
        frame_bytes(bytes(data))
    data = bytearray(frame())
    data[48:52] = struct.pack("<I", 1 << 31)
    with pytest.raises(FrameDamaged, match="shape of"):
        read(bytes(data))


@pytest.mark.parametrize(
    "asked",
    [
        {"fingerprint": b"g" * 16},
        {"key": b"j" * 16},
        {"group": 2},
        {"shape": layouts.attention(1, 2, 4, 16, Number.FLOAT16)},
        {"shape": layouts.attention(2, 1, 4, 16, Number.BFLOAT16)},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_a_frame_of_anything_else_than_asked_for_is_foreign(asked):
    with pytest.raises(ForeignFrame, match=r"another (fingerprint|key|KV cache group|shape)"):
        read(frame(), **asked)


def test_frames_of_other_versions_and_codecs_are_left_alone():
    for place, match in ((4, "version 9"), (5, "codec 9")):
        data = bytearray(frame())
        data[place] = 9
        with pytest.raises(FrameNotRead, match=match):
            read(signed(bytes(data)))


@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "encrypted"])
def test_a_block_that_lost_something_before_is_lossy_though_its_codec_is_exact(secret):
    made = block(SHAPE, position=8)
    data = write(codecs.named("raw-z"), made, fingerprint=FINGERPRINT, key=KEY, group=3, secret=secret, lossy=True)
    header, out = read(data, secret)
    assert (header.codec.quality, header.quality) == (Quality.EXACT, Quality.LOSSY)
    assert (out == made.content).all()


def test_a_lossy_frame_that_calls_itself_exact_is_damage():
    data = bytearray(frame("int8"))
    data[6] = 0
    with pytest.raises(FrameDamaged, match="flags"):
        read(signed(bytes(data)))


def test_a_frame_opens_with_the_key_it_was_encrypted_with_and_no_other():
    data = frame("raw", SECRET)
    with pytest.raises(FrameLocked, match="another key"):
        read(data, b"t" * 32)
    with pytest.raises(FrameLocked, match="no key"):
        read(data)
    with pytest.raises(FrameLocked, match="not encrypted"):
        read(frame("raw"), SECRET)
    assert block(SHAPE, position=8).content.tobytes()[:32] not in data


def test_an_encrypted_frame_cannot_be_passed_off_as_another_blocks():
    data = bytearray(frame("raw", SECRET))
    data[24:40] = b"j" * 16
    with pytest.raises(FrameLocked):
        read(signed(bytes(data)), SECRET, key=b"j" * 16)
