"""The body that the engine gets: the client's bytes with a plan's changes put in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from gateway.api.encodings import encode_half_pairs
from gateway.errors import InvalidJson
from gateway.http_server.transaction import JSON_LINE
from gateway.token_ids import TokenIds


def _leave_out(value: object) -> msgspec.Raw:
    if isinstance(value, TokenIds):
        return _GAP_IN_LIST
    raise TypeError(f"{type(value).__name__} is no part of a body")


def _write(value: object) -> msgspec.Raw:
    if isinstance(value, TokenIds):
        return value.json()
    raise TypeError(f"{type(value).__name__} is no part of a body")


def _listed(value: object) -> list[int]:
    if isinstance(value, TokenIds):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no part of a body")


_encode = msgspec.json.Encoder(enc_hook=_write).encode
_GAP = b"\0"  # which JSON has nowhere, not in strings either
_GAP_IN_LIST = msgspec.Raw(b"[%b]" % _GAP)
_encode_around = msgspec.json.Encoder(enc_hook=_leave_out).encode

Buffer = bytes | bytearray | memoryview
COPIED_BYTES_MAX = 1 << 20
"""What is kept of a large body is copied, so that the rest may go, if it is no more than this: the event loop waits for it."""


class EngineBody(msgspec.Struct, frozen=True, gc=False, eq=False):
    """What all attempts to serve a request send: all of the client's body that is kept once the request is planned.

    `pieces`, one behind the other, are a JSON object without its last brace; `is_empty` says that nothing is in it.
    """

    pieces: Sequence[Buffer]
    is_empty: bool = False

    @property
    def type_line(self) -> bytes:
        """The header that says what it is."""
        return JSON_LINE

    def parts(self, changes: Mapping[str, Any]) -> list[Buffer]:
        """The request for the engine with `changes`, in parts to be sent one behind the other. Raises InvalidJson.

        They come last: of a name that occurs twice vLLM takes the last one.
        """
        parts = [*self.pieces]
        if not changes:
            parts.append(b"}")
            return parts
        if not self.is_empty:
            parts.append(b",")
        ids = [each for value in changes.values() if type(value) is dict for each in value.values() if type(each) is TokenIds]
        if not ids:
            parts.append(_encoded(changes, _encode)[1:])
            return parts
        before, *behind = _encoded(changes, _encode_around)[1:].split(_GAP)
        parts.append(before)
        for known, piece in zip(ids, behind, strict=True):
            parts += known.texts()
            parts.append(piece)
        return parts


def engine_body(body: dict[str, Any], raw: bytes | bytearray | None, prompt: Sequence[Any] | None) -> EngineBody:
    """The client's `body`, with a `prompt` in place of its own if that is not None.

    `raw` is what `body` was decoded from, None if something was taken out since: if nothing in it is replaced it is passed on
    as it came. Raises InvalidJson.
    """
    if prompt is None and raw is not None:
        return EngineBody([raw[: raw.rindex(b"}")]], is_empty=not body)
    if isinstance(prompt, TokenIds):
        rest = {name: value for name, value in body.items() if name != "prompt"}
        return EngineBody([b'{"prompt":[', *prompt.texts(), b"]," + _encoded(rest, _encode)[1:-1] if rest else b"]"])
    whole = body if prompt is None else {**body, "prompt": prompt}
    return EngineBody([_encoded(whole, _encode)[:-1]], is_empty=not whole)


def spliced_body(raw: bytes | bytearray, span: tuple[int, int], prompt: Sequence[Any] | None) -> EngineBody:
    """As `engine_body`, of a large body that holds the prompt's value at `span`, and is passed on as it came but for that."""
    whole, end = memoryview(raw), raw.rindex(b"}")
    if prompt is None:
        return EngineBody([whole[:end]], is_empty=raw.find(b'"', 0, end) < 0)
    start, behind = span
    sent = [b"[", *prompt.texts(), b"]"] if isinstance(prompt, TokenIds) else [_encode(prompt)]
    return EngineBody([_kept(whole[:start]), *sent, _kept(whole[behind:end])])


def _kept(part: memoryview) -> Buffer:
    return bytes(part) if len(part) <= COPIED_BYTES_MAX else part


def _encoded(value: Mapping[str, Any], encode: Callable[[object], bytes]) -> bytes:
    try:
        try:
            return encode(value)
        except UnicodeEncodeError:  # half a surrogate pair, which UTF-8 cannot express
            return encode_half_pairs(value, _listed)
    except (OverflowError, RecursionError, ValueError) as error:
        raise InvalidJson(f"The body cannot be passed on: {error}.") from None
