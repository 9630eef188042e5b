"""The rest of a stream, made of another engine's events: the whole has one id, and nothing in it comes twice."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.continuation.events import DATA, DONE, EVENT_END, Diverged, events_in

decode_event = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.Encoder().encode


class RestOfStream:
    """Of a stream that began under `id`; `usage_sent` says that the client has the usage.

    A subclass knows what else the client has: `_is_news` leaves that out, `_correct` makes an event speak of the whole stream.
    """

    def __init__(self, id: str, created: int, *, usage_sent: bool) -> None:
        self._id, self._created, self._usage_sent = id, created, usage_sent

    def take(self, chunk: bytes) -> bytes:
        """Return the events that the client is to get for these whole ones. Raises Diverged."""
        return b"".join([each for event in events_in(chunk) if (each := self._event(event))])

    def _event(self, event: bytes) -> bytes:
        if event == DONE:
            return event + EVENT_END
        try:
            found = decode_event(event[len(DATA) :])
            choices = found.get("choices") or []
            if not choices and found.get("usage") is not None and self._usage_sent:
                return b""
            if choices and not self._is_news(choices[0]):
                return b""
            self._correct(found)
        except (msgspec.MsgspecError, UnicodeDecodeError, AttributeError, TypeError, KeyError) as error:
            raise Diverged(f"an event that cannot be read: {error}") from None
        found["id"], found["created"] = self._id, self._created
        return DATA + _encode(found) + EVENT_END

    def _is_news(self, choice: dict[str, Any]) -> bool:
        """Leave out of an event what the client has; False if nothing is left of it. Raises Diverged."""
        raise NotImplementedError

    def _correct(self, event: dict[str, Any]) -> None:
        """Change what an event says of its own part alone, such as the usage."""
        raise NotImplementedError
