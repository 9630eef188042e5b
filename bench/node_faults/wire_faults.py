"""What goes wrong on the wire: by bytes where TLS guards them, by frames where nothing does.

What nothing can find is left out: a node with a key of ours that sends other bytes than its block has.
"""

from collections.abc import Callable
from random import Random

from bench.node_faults.wire import Passed, Then, Toward
from transport.node.messages import LENGTH_BYTES, Beat, BlocksSent, body_bytes, decode, encode

HARMED_BYTES_MAX = 64


class Bytes:
    """From byte `after` on, of those that go `toward` one side, `harm` is done to what goes there, once or until it is over."""

    def __init__(self, toward: Toward, after: int, harm: Callable[[bytes], Passed], once: bool = True) -> None:
        self.refuses = self.anew = self.hit = False
        self._toward, self._left, self._harm, self._once = toward, after, harm, once

    def passed(self, connection: int, toward: Toward, data: bytes) -> Passed:
        """As WireFault has it."""
        if toward != self._toward or (self.hit and self._once):
            return Passed(data)
        if self._left >= len(data):
            self._left -= len(data)
            return Passed(data)
        place, self._left, self.hit = self._left, 0, True
        harmed = self._harm(data[place:])
        return Passed(data[:place] + harmed.data, harmed.then)


class Refusal:
    """Connections end as soon as they are made."""

    def __init__(self) -> None:
        self.refuses, self.anew, self.hit = True, True, False

    def passed(self, connection: int, toward: Toward, data: bytes) -> Passed:
        """As WireFault has it."""
        self.hit = True
        return Passed(b"", "cut")


class Frames:
    """The frame that announces blocks, after so many others of them, is harmed, on a wire without TLS."""

    def __init__(self, after: int, harm: Callable[[BlocksSent], tuple[bytes, Then]]) -> None:
        self.refuses, self.anew, self.hit = False, True, False
        self._left, self._harm = after, harm
        self._streams: dict[int, tuple[bytearray, int]] = {}
        """By connection: what was not passed on yet, and how many bytes of blocks come before the next frame."""

    def passed(self, connection: int, toward: Toward, data: bytes) -> Passed:
        """As WireFault has it."""
        if toward == "owner" or self.hit:
            return Passed(data)
        held, blocks = self._streams.get(connection, (bytearray(), 0))
        held += data
        out = bytearray()
        while True:
            out += held[:blocks]
            blocks, held = max(0, blocks - len(held)), held[blocks:]
            end = LENGTH_BYTES + body_bytes(bytes(held[:LENGTH_BYTES])) if len(held) >= LENGTH_BYTES else LENGTH_BYTES
            if blocks or len(held) < end or not held:
                self._streams[connection] = held, blocks
                return Passed(bytes(out))
            frame, held = held[:end], held[end:]
            message = decode(frame[LENGTH_BYTES:])
            if isinstance(message, BlocksSent) and not message.last:
                if not self._left:
                    self.hit = True
                    harmed, then = self._harm(message)
                    return Passed(bytes(out + harmed + (b"" if then == "cut" else held)), then)
                self._left -= 1
                blocks = len(message.good) * message.bytes
            out += frame


def _flipped(random: Random, data: bytes) -> bytes:
    harmed = bytearray(data)
    for _ in range(random.randint(1, HARMED_BYTES_MAX)):
        harmed[random.randrange(len(harmed))] ^= random.randint(1, 255)
    return bytes(harmed) if harmed != data else bytes([harmed[0] ^ 1]) + bytes(harmed[1:])


def _some(random: Random) -> int:
    return random.randint(1, HARMED_BYTES_MAX)


HARMS: dict[str, Callable[[Random], Callable[[bytes], Passed]]] = {
    "cut": lambda _: lambda data: Passed(b"", "cut"),
    "ended one way": lambda _: lambda data: Passed(b"", "end one way"),
    "silent past the deadline": lambda _: lambda data: Passed(b"", "hold"),
    "a byte now and then, past the deadline": lambda _: lambda data: Passed(data, "dribble"),
    "bytes changed": lambda random: lambda data: Passed(_flipped(random, data)),
    "bytes left out": lambda random: lambda data: Passed(data[_some(random) :]),
    "bytes put in": lambda random: lambda data: Passed(random.randbytes(_some(random)) + data),
    "bytes twice": lambda random: lambda data: Passed(data[: _some(random)] + data),
}
"""On a wire with TLS, from some byte on."""
LASTING: dict[str, Callable[[Random], Callable[[bytes], Passed]]] = {
    "garbage from there on": lambda random: lambda data: Passed(random.randbytes(len(data))),
}


def _other(message: BlocksSent, good: bytes | None = None, size: int | None = None, last: bool = False) -> bytes:
    return encode(
        BlocksSent(message.good if good is None else good, message.bytes if size is None else size, last, "as a fault has it")
    )


FRAME_HARMS: dict[str, Callable[[Random], Callable[[BlocksSent], tuple[bytes, Then]]]] = {
    "a frame of garbage": lambda random: lambda message: (b"\0\0\0\x40" + random.randbytes(64), "go on"),
    "a frame of any length": lambda random: lambda message: (random.randbytes(LENGTH_BYTES) + b"x", "go on"),
    "another answer": lambda _: lambda message: (encode(Beat(1)), "go on"),
    "blocks of another size": lambda random: (
        lambda message: (
            _other(message, size=message.bytes + random.choice((-1, 1, 64))),
            "go on",
        )
    ),
    "more blocks than were asked for": lambda _: lambda message: (_other(message, message.good * 100), "go on"),
    "an early end": lambda _: lambda message: (_other(message, b"", 0, True), "go on"),
    "cut inside a block": lambda random: lambda message: (_other(message) + random.randbytes(message.bytes // 2), "cut"),
}
"""On a wire without TLS."""
