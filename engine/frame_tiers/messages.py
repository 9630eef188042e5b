"""What a gateway and the process of the frame tiers tell each other, over a socket in the run directory."""

import struct
from typing import Annotated

import msgspec
from pydantic import Field

from engine.frame_tiers.store import StoreStats

SOCKET = "tiers.sock"
MESSAGE_BYTES_MAX = 16 << 20
LENGTH = struct.Struct("<I")
"""In front of each message, which is msgpack."""


class Promote(msgspec.Struct, tag="promote", frozen=True):
    """Bring up what a prompt lacks behind its first `begin` tokens, within `seconds`; `keys` are its whole chain's.

    `lossy`: they are those of a caller who accepts loss.
    """

    id: int
    fingerprint: bytes
    keys: bytes
    begin: int
    seconds: float
    lossy: bool = False


class Promoted(msgspec.Struct, tag="promoted", frozen=True):
    """The table `source` holds the prompt up to `tokens` for who has the first `begin`; "" and `why` if nothing came up.

    `frames` were read, `bytes` long.
    """

    id: int
    source: str = ""
    tokens: int = 0
    frames: int = 0
    bytes: int = 0
    seconds: float = 0.0
    why: str = ""


class Pin(msgspec.Struct, tag="pin", frozen=True):
    """Keep a prefix, whose chain has `keys`, for `seconds` from now, under a number; another under the same replaces it."""

    number: int
    fingerprint: bytes
    keys: bytes
    seconds: float


class Unpin(msgspec.Struct, tag="unpin", frozen=True):
    """Keep the prefix of that number no longer than others."""

    number: int


class Flush(msgspec.Struct, tag="flush", frozen=True):
    """Forget everything."""

    id: int


class Flushed(msgspec.Struct, tag="flushed", frozen=True):
    """Why each store could not be emptied, "" if it was."""

    id: int
    stores: dict[str, str]


class TierStats(msgspec.Struct, tag="stats", frozen=True):
    """Sent to everybody about once a second: the stores, and the ways down and up, since the process began."""

    stores: tuple[StoreStats, ...] = ()
    lost_blocks: Annotated[int, Field(description="blocks that gave way in host memory before they were copied")] = 0
    unknown_blocks: Annotated[int, Field(description="blocks in host memory that are not what their keys say")] = 0
    promotions: Annotated[int, Field(description="prompts that something was brought up for")] = 0
    promotions_late: Annotated[int, Field(description="prompts for which not all came up in time")] = 0
    staged_blocks: Annotated[int, Field(description="blocks brought up, into memory that engines import from")] = 0
    pid: int = 0


Ask = Promote | Flush | Pin | Unpin
Answer = Promoted | Flushed | TierStats
_asks: msgspec.msgpack.Decoder[Ask] = msgspec.msgpack.Decoder(Ask)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode(message: Ask | Answer) -> bytes:
    """Return a message with its length in front."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


def decode_ask(body: bytes) -> Ask:
    """Raises msgspec.MsgspecError."""
    return _asks.decode(body)


def decode_answer(body: bytes) -> Answer:
    """Raises msgspec.MsgspecError."""
    return _answers.decode(body)
