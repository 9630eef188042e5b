"""A large body, of which only the known fields are decoded: what else it holds is passed over and takes no memory. Pure.

A decoded body takes up to 30 times its bytes, and decoding holds up all else in its process for a tenth of a second or more: so
this is for a process beside the event loop (gateway/relay/large_bodies/pool.py).
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from gateway.api.body import FORBIDDEN_FIELDS, check_body, decode_body
from gateway.api.endpoints import Endpoint
from gateway.api.fields import PASSED_FIELDS
from gateway.errors import InvalidJson

_ABSENT = msgspec.Raw(b"")
HINTS = frozenset(("prompt_cache_key", "prompt_cache_retention", "metadata", "store", "service_tier", "safety_identifier"))
"""Fields of OpenAI's that vLLM passes over."""
OTHERS = "\0"
"""Stands in the fields for those that nobody knows, if there are any: they may do anything to a chat's prompt."""
NAMES = tuple(sorted(PASSED_FIELDS | FORBIDDEN_FIELDS.keys() | HINTS))
_Fields = msgspec.defstruct("_Fields", [(name, msgspec.Raw, _ABSENT) for name in NAMES])
_decode_fields = msgspec.json.Decoder(_Fields).decode
_Only = msgspec.defstruct("_Only", [(name, msgspec.Raw, _ABSENT) for name in NAMES], forbid_unknown_fields=True)
_decode_only = msgspec.json.Decoder(_Only).decode
_decode = msgspec.json.Decoder().decode

Span = tuple[int, int]


def decode_partly(endpoint: Endpoint, raw: bytes) -> tuple[dict[str, Any], Span]:
    """The known fields of the JSON object in `raw`, checked, and where the prompt's value is in it, (0, 0) for nowhere.

    `raw` is passed on as it came: a forbidden field that says nothing stays in it, before what the gateway puts there. Raises
    InvalidJson, UnsupportedParameter and InvalidRequest.
    """
    span = (0, 0)
    try:
        fields = _decode_fields(raw)
        given = {name: value for name in NAMES if len(memoryview(value := getattr(fields, name)))}
        body = {name: _decode(value) for name, value in given.items()}
        if "prompt" in given:
            span = _span(given["prompt"], raw)
        if _has_others(raw):
            body[OTHERS] = None
    except RecursionError:
        raise InvalidJson("The body is nested too deeply.") from None
    except msgspec.ValidationError:
        raise InvalidJson("The body must be a JSON object.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        decode_body(raw)  # which says what is wrong, or that it is too large for what is
        raise InvalidJson("Half a surrogate pair is not taken in a body so large.") from None
    check_body(endpoint, body)
    return body, span


def _has_others(raw: bytes) -> bool:
    try:
        _decode_only(raw)
    except msgspec.ValidationError:
        return True
    return False


def _span(part: msgspec.Raw, whole: bytes) -> Span:
    """Where a part that was decoded without copying is in the whole."""
    start = _address(part) - _address(whole)
    return start, start + len(memoryview(part))


def _address(buffer: Any) -> int:
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address
