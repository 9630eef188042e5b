"""The usage event of a stream whose client did not ask for it: the gateway asks, and keeps it for itself."""

from __future__ import annotations

import re

import msgspec

_EVENT = b"data: "
_EVENT_END = b"\n\n"
_DONE = b"data: [DONE]"
_USAGE = b'"usage"'
"""Within a string of JSON the quotes would be escaped."""
_ENDS_CHOICE = re.compile(rb'"finish_reason": ?"')
_FINGERPRINT = b'"system_fingerprint"'


class _Event(msgspec.Struct):
    usage: dict[str, msgspec.Raw] | None = None
    choices: list[msgspec.Raw] | None = None
    system_fingerprint: str | None = None


_decode = msgspec.json.Decoder(_Event).decode


class UsageHider:
    """Takes the events of one stream, and gives those that the client gets.

    vLLM puts its fingerprint into the usage event, if there is one, and else into those that end a choice. So these wait for
    the former.
    """

    def __init__(self) -> None:
        self._ends: list[bytes] = []

    def take(self, chunk: bytes) -> bytes:
        """Whole events without those that tell the usage alone."""
        if not self._ends and _USAGE not in chunk and _ENDS_CHOICE.search(chunk) is None:
            return chunk
        *events, rest = chunk.split(_EVENT_END)
        shown: list[bytes] = []
        for event in events:
            usage = _usage_alone(event)
            if usage is not None:
                shown.append(self._released(usage.system_fingerprint))
            elif event == _DONE:
                shown.append(self.end() + event + _EVENT_END)
            elif _ENDS_CHOICE.search(event) is not None:
                self._ends.append(event)
            else:
                shown.append(event + _EVENT_END)
        return b"".join(shown) + rest

    def end(self) -> bytes:
        """What waits for a usage event that does not come."""
        return self._released(None)

    def _released(self, fingerprint: str | None) -> bytes:
        ends, self._ends = self._ends, []
        return b"".join([_stamped(event, fingerprint) + _EVENT_END for event in ends])


def _stamped(event: bytes, fingerprint: str | None) -> bytes:
    if fingerprint is None or _FINGERPRINT in event or not event.endswith(b"}"):
        return event
    return b"%b,%b:%b}" % (event[:-1], _FINGERPRINT, msgspec.json.encode(fingerprint))


def _usage_alone(event: bytes) -> _Event | None:
    if _USAGE not in event or not event.startswith(_EVENT):
        return None
    try:
        found = _decode(event[len(_EVENT) :])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return found if found.usage is not None and found.choices == [] else None
