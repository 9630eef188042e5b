"""As much of RESP2 as we speak: commands as bytes, who we are, and replies out of what has come so far. Pure."""

from collections.abc import Sequence
from typing import TypeAlias

from engine.frame_tiers.vault.address import VaultAddress

VALUE_BYTES_MAX = 256 << 20
"""A larger value is no frame of ours."""
ITEMS_MAX = 1 << 20
DEPTH_MAX = 4
NUMBER_DIGITS_MAX = 20
"""Of a number with 64 bits."""

Word = bytes | memoryview
Reply: TypeAlias = "bytes | int | list[Reply] | VaultError | None"


class VaultGone(Exception):
    """The server cannot be reached, does not answer in time, or answers what is no answer: the connection is of no use."""


class VaultError(Exception):
    """The server answered with an error; the connection can be used."""


def pieces(words: Sequence[Word]) -> list[Word]:
    """A command, in pieces to be sent one after the other, so that no value is copied."""
    found: list[Word] = []
    head = b"*%d\r\n" % len(words)
    for word in words:
        found += (head + b"$%d\r\n" % len(word), word)
        head = b"\r\n"
    return [*found, b"\r\n"]


def hello(address: VaultAddress) -> list[list[Word]]:
    """The commands by which a connection is let in, and is where it should be."""
    found: list[list[Word]] = []
    if address.password is not None:
        who: list[Word] = [address.user.encode()] if address.user else []
        found.append([b"AUTH", *who, address.password.encode()])
    if address.database:
        found.append([b"SELECT", b"%d" % address.database])
    return found


def read_reply(data: bytes | bytearray, begin: int, depth: int = 0) -> tuple[Reply, int] | None:
    """The reply that begins there, and where it ends; None if it has not come as a whole. Raises VaultGone for what is none."""
    end = data.find(b"\r\n", begin)
    if end < 0:
        return None
    kind, rest, after = data[begin : begin + 1], bytes(data[begin + 1 : end]), end + 2
    if kind == b"+":
        return rest, after
    if kind == b"-":
        return VaultError(rest.decode("utf-8", "replace")), after
    if kind == b":":
        return number(rest), after
    if kind == b"$":
        size = value_size(rest)
        if size is None:
            return None, after
        if len(data) < after + size + 2:
            return None
        return bytes(data[after : after + size]), after + size + 2
    if kind == b"*":
        items: list[Reply] = []
        for _ in range(items_count(rest, depth)):
            found = read_reply(data, after, depth + 1)
            if found is None:
                return None
            items.append(found[0])
            after = found[1]
        return items, after
    raise VaultGone("an answer that is none")


def value_size(digits: bytes) -> int | None:
    """The size of a value by what stands behind its `$`, None where there is no value. Raises VaultGone."""
    size = number(digits)
    if size == -1:
        return None
    if 0 <= size <= VALUE_BYTES_MAX:
        return size
    raise VaultGone("an answer that is none")


def items_count(digits: bytes, depth: int) -> int:
    """How many replies a list has by what stands behind its `*`, `depth` lists deep. Raises VaultGone."""
    count = number(digits)
    if 0 <= count <= ITEMS_MAX and depth < DEPTH_MAX:
        return count
    raise VaultGone("an answer that is none")


def number(digits: bytes) -> int:
    """The number that is written there. Raises VaultGone for what is none, or has more than 64 bits."""
    if len(digits) <= NUMBER_DIGITS_MAX and digits.removeprefix(b"-").isdigit():
        return int(digits)
    raise VaultGone("an answer that is none")
