"""Bodies that are not plain UTF-8 JSON, read the way vLLM reads them: with Python's json.loads."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from gateway.errors import InvalidJson

HALF_PAIRS_BYTES_MAX = 1 << 20
"""A larger body with half a surrogate pair is refused: what reads it takes 20 ms for so much and lets nothing else run."""
_BRACE = 0x7B


def as_utf8(raw: bytes | bytearray) -> bytes | bytearray:
    """The same JSON in UTF-8 without a byte order mark; JSON may come in UTF-16 and UTF-32 too. Raises InvalidJson."""
    if len(raw) > 1 and raw[0] == _BRACE and raw[1]:  # an object in UTF-8, as in nearly all cases
        return raw
    encoding = json.detect_encoding(raw)
    if encoding == "utf-8":
        return raw
    try:
        return raw.decode(encoding).encode()
    except UnicodeError as error:
        raise InvalidJson(f"The body is not JSON: {error}.") from None


def decode_half_pairs(raw: bytes | bytearray) -> Any:
    """Decode JSON whose strings hold half a surrogate pair, as a client's that cut a text in the middle of a character.

    Raises InvalidJson, also for what is no JSON although json.loads takes it: NaN and infinite numbers.
    """
    if len(raw) > HALF_PAIRS_BYTES_MAX:
        raise InvalidJson(
            "The body ends within a string, or has half a surrogate pair in one, which is not taken in one so large."
        )
    try:
        return json.loads(raw, parse_constant=_refuse, parse_float=_finite)
    except ValueError as error:
        raise InvalidJson(f"The body is not JSON: {error}.") from None


def is_whole(value: object) -> bool:
    """Whether no text in a value out of JSON holds half a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def encode_half_pairs(value: object, tokens: Any) -> bytes:
    """Encode what `decode_half_pairs` gave; `tokens` makes lists of what JSON does not know. Raises ValueError."""
    return json.dumps(value, default=tokens, allow_nan=False, separators=(",", ":")).encode()


def _refuse(name: str) -> NoReturn:
    raise InvalidJson(f"The body is not JSON: {name} is not a number in JSON.")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise InvalidJson("The body has a number that is out of range.")
    return number
