"""The usage of a stream that its client did not ask for: the gateway has the engine send it, and keeps it for itself."""

from __future__ import annotations

import msgspec

_EVENT = b"data: "
_EVENT_END = b"\n\n"
_USAGE = b'"usage"'
"""Within a string of JSON the quotes would be escaped."""


class _Event(msgspec.Struct):
    usage: dict[str, msgspec.Raw] | None = None
    choices: list[msgspec.Raw] | None = None


_decode = msgspec.json.Decoder(_Event).decode


def without_usage(chunk: bytes) -> bytes:
    """Whole events without those that tell the usage alone."""
    if _USAGE not in chunk:
        return chunk
    return _EVENT_END.join([event for event in chunk.split(_EVENT_END) if not _is_usage_alone(event)])


def _is_usage_alone(event: bytes) -> bool:
    if _USAGE not in event or not event.startswith(_EVENT):
        return False
    try:
        found = _decode(event[len(_EVENT) :])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
    return found.usage is not None and found.choices == []
