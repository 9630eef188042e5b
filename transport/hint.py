"""What the gateway tells the engine about a request: `kv_transfer_params {"peerkv": {...}}`, every field optional."""

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

HINT = "peerkv"
"""The key of `kv_transfer_params` that carries the hint."""

PIN_SECONDS_MAX = 86400.0
UNPIN_MAX = 256
"""Pins that one hint may end."""
STORE_MAX = 8192
"""Blocks that one hint may have stored: as many as are stored at a time."""

_WORD = 1 << 63
_Value = TypeVar("_Value")


class PinWish(msgspec.Struct, frozen=True):
    """Pin the prompt's full blocks under the number `id`, for `seconds` from when it is computed; another wish replaces it."""

    id: int
    seconds: float


class Hint(msgspec.Struct, frozen=True, omit_defaults=True):
    """`source`: import from this replica first, "" for no import, None leaves it to the engine. `tag`: the gateway's number.

    `tokens`: import only up to so many tokens of the prompt, local ones included. `unpin`: numbers of pins that end.
    `store`: blocks of the engine's to store in host memory, whatever the request is about; a node's agent asks for that.
    `malformed` counts the fields that were ignored.
    """

    source: str | None = None
    tag: int = 0
    tokens: int | None = None
    pin: PinWish | None = None
    unpin: tuple[int, ...] = ()
    store: tuple[int, ...] = ()
    malformed: int = 0


_NONE = Hint()


def write_hint(hint: Hint) -> dict[str, Any]:
    """Return the hint as `kv_transfer_params`."""
    return {HINT: msgspec.to_builtins(hint)}


def read_hint(params: Any) -> Hint:
    """Return the hint in a request's `kv_transfer_params`. A field that is not what it should be counts as absent."""
    given = params.get(HINT) if isinstance(params, dict) else None
    if given is None:
        return _NONE
    if not isinstance(given, dict):
        return Hint(malformed=1)
    malformed = 0

    def field(name: str, read: Callable[[Any], _Value], otherwise: _Value) -> _Value:
        nonlocal malformed
        if name not in given:
            return otherwise
        try:
            return read(given[name])
        except (TypeError, ValueError, KeyError):
            malformed += 1
            return otherwise

    none: tuple[int, ...] = ()
    source, tag = field("source", _text, None), field("tag", _number, 0)
    tokens, pin, unpin = field("tokens", _number, None), field("pin", _pin, None), field("unpin", _unpinned, none)
    store = field("store", _stored, none)
    return Hint(source, tag, tokens, pin, unpin, store, malformed)


def _text(value: Any) -> str | None:
    if not isinstance(value, str):
        raise TypeError
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _WORD:
        raise TypeError
    return value


def _unpinned(value: Any) -> tuple[int, ...]:
    return _numbers(value, UNPIN_MAX)


def _stored(value: Any) -> tuple[int, ...]:
    return _numbers(value, STORE_MAX)


def _numbers(value: Any, most: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > most:
        raise TypeError
    return tuple(_number(each) for each in value)


def _pin(value: Any) -> PinWish | None:
    if not isinstance(value, dict):
        raise TypeError
    seconds = value["seconds"]
    if type(seconds) not in (int, float) or not 0 < seconds <= PIN_SECONDS_MAX:
        raise ValueError
    return PinWish(_number(value["id"]), float(seconds))
