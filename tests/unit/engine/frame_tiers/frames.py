"""Frames for the tests of stores."""

import time

import numpy as np

from engine.frame_tiers.store import frame_id
from transport.frames import codecs, layouts
from transport.frames.codec import Block
from transport.frames.errors import FrameError
from transport.frames.frame import read_header, write
from transport.frames.shape import Number

SHAPE = layouts.state(2, 300, Number.BFLOAT16)
FINGERPRINT = b"f" * 16


def key(number):
    return number.to_bytes(16, "little")


def content(number):
    return np.random.default_rng(number).integers(0, 256, SHAPE.nbytes, np.uint8)


def frame(number, codec="raw", fingerprint=FINGERPRINT):
    block = Block(SHAPE, content(number))
    return write(codecs.named(codec), block, fingerprint=fingerprint, key=key(number))


def whole(number, data):
    """What whoever reads a frame does: believe only what matches its checksum."""
    try:
        read_header(data)
    except FrameError:
        return False
    return True


SIZE = len(frame(0))


def entries(numbers):
    return [(frame_id(data), data) for data in map(frame, numbers)]


def ids(numbers):
    return [frame_id(frame(number)) for number in numbers]


def soon(seconds=5.0):
    return time.monotonic() + seconds


def fetched(store, numbers, good=lambda number, data: True, deadline=None):
    """What a store gives of these numbers: {number: frame}."""
    numbers, found = list(numbers), {}

    def take(place, data):
        found[numbers[place]] = bytes(data)
        return good(numbers[place], data)

    store.fetch(ids(numbers), take, soon() if deadline is None else deadline)
    return found
