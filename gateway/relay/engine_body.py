"""The body that the engine gets: the client's bytes with a plan's changes put in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from gateway.api.encodings import encode_half_pairs
from gateway.errors import InvalidJson
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


def request_parts(body: dict[str, Any], raw: bytes | None, changes: Mapping[str, Any]) -> list[bytes]:
    """The request for the engine, `body` with `changes`, in parts to be sent one behind the other.

    `raw` is what `body` was decoded from, None if something was taken out since. If nothing in it is replaced it is passed on
    as it came, with what is new behind: of a name that occurs twice vLLM takes the last one too. Raises InvalidJson.
    """
    prompt = changes.get("prompt")
    if raw is not None and body and prompt is None:
        if not changes:
            return [raw]
        parts, rest = [raw[: raw.rindex(b"}")], b","], changes
        ids = [each for value in changes.values() if type(value) is dict for each in value.values() if type(each) is TokenIds]
        if ids:
            before, *behind = _encoded(changes, _encode_around)[1:].split(_GAP)
            parts.append(before)
            for known, piece in zip(ids, behind, strict=True):
                parts += known.texts()
                parts.append(piece)
            return parts
    elif isinstance(prompt, TokenIds):
        rest = {**body, **changes}
        del rest["prompt"]
        parts = [b'{"prompt":[', *prompt.texts(), b"]," if rest else b"]"]
    else:
        return [_encoded({**body, **changes}, _encode)]
    parts.append(_encoded(rest, _encode)[1:])
    return parts


def _encoded(value: Mapping[str, Any], encode: Callable[[object], bytes]) -> bytes:
    try:
        try:
            return encode(value)
        except UnicodeEncodeError:  # half a surrogate pair, which is no UTF-8
            return encode_half_pairs(value, _listed)
    except (OverflowError, RecursionError, ValueError) as error:
        raise InvalidJson(f"The body cannot be passed on: {error}.") from None
