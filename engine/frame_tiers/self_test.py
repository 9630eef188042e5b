"""Before a store is used: one frame is stored, fetched and compared, and what cannot do that is not used."""

import os
import time

import numpy as np

from engine.frame_tiers.store import FrameStore, frame_id
from transport.frames import layouts
from transport.frames.codec import Block
from transport.frames.codecs import named
from transport.frames.errors import FrameError
from transport.frames.frame import read_into, write
from transport.frames.shape import Number

SECONDS_MAX = 5.0
_SHAPE = layouts.attention(2, 4, 16, 64, Number.BFLOAT16)
"""As blocks of attention are, of a small model: 64 KiB."""
_FINGERPRINT = b"peerkv self-test"


def self_test(store: FrameStore) -> str:
    """Return what is wrong with a store, "" if nothing: a block must come back to the last bit, and be gone when removed.

    One that takes nothing now, such as a full disk, is used for what it holds: each frame is checked when it is read.
    """
    content = np.frombuffer(os.urandom(_SHAPE.nbytes), np.uint8)
    key = os.urandom(16)
    frame = write(named("raw-z"), Block(_SHAPE, content), fingerprint=_FINGERPRINT, key=key)
    back = np.zeros(_SHAPE.nbytes, np.uint8)
    read: list[bool] = []

    def take(place: int, data: memoryview) -> bool:
        try:
            read_into(back, data, fingerprint=_FINGERPRINT, key=key, shape=_SHAPE)
        except FrameError:
            return False
        read.append(True)
        return True

    each = frame_id(frame)
    store.put([(each, frame)])
    store.fetch([each], take, time.monotonic() + SECONDS_MAX)
    if not read:
        if not store.ready() and store.stats().frames:
            return ""
        state = store.stats().state
        return f"a block that was stored did not come back{'' if state == 'ok' else f' ({state})'}"
    if not np.array_equal(back, content):
        return "a block came back changed"
    store.remove([each])
    if any(store.holds([each], time.monotonic() + SECONDS_MAX)):
        return "a block that was removed is still there"
    return ""
