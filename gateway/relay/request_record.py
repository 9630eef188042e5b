"""What became of one request, gathered while it is served and told once when it is over."""

from __future__ import annotations

from typing import Protocol, cast

import msgspec

from gateway.api.endpoints import ENDPOINTS, Endpoint
from gateway.api.usage import Usage, usage_of
from gateway.ledger.attempts import Attempt
from gateway.relay.tracing import Trace

ENDING_BYTES_MAX = 64 << 10


class RequestRecord(msgspec.Struct, eq=False, gc=False):
    """`endpoint` is of a fixed set. Seconds are since the request came; `ended_at` is of time.perf_counter.

    `attempt` is the last one, None if the request never reached a replica; `attempts` is their number, `prompt_attempt` the one
    that a stream began with which another one went on with. `tenant` is "" for a caller that is not known, `model` "" for one
    that is not served. `error` is the code of the error that the client got, or that ended its stream.

    `usage` is what the answer says, once `read_counts` has looked for it in `ending`, its last bytes. A stream that
    does not say it has `events` instead, which have one token each as a rule.
    """

    endpoint: str
    request_id: str = ""
    tenant: str = ""
    model: str = ""
    streamed: bool = False
    attempt: Attempt | None = None
    attempts: int = 0
    prompt_attempt: Attempt | None = None
    usage: Usage | None = None
    events: int = 0
    ending: bytes = b""
    status: int = 0
    error: str = ""
    seconds: float = 0.0
    first_byte_seconds: float | None = None
    ended_at: float = 0.0
    trace: Trace | None = None

    def ends_with(self, ending: bytes) -> None:
        """What may hold the counts of tokens. It is kept until they are read, or if it is large read at once."""
        if len(ending) > ENDING_BYTES_MAX:
            self.usage = usage_of(ending, self._kind)
        else:
            self.ending = ending

    def read_counts(self) -> None:
        """Find `usage`; without it a stream's events stand for it."""
        if self.ending:
            self.usage, self.ending = usage_of(self.ending, self._kind), b""
        if self.usage is not None:
            self.events = 0

    @property
    def _kind(self) -> Endpoint:
        return cast(Endpoint, self.endpoint) if self.endpoint in ENDPOINTS else "completions"

    @property
    def completion_tokens(self) -> int:
        """Generated tokens; those of a stream that does not tell their number are estimated by its events."""
        return self.usage.completion_tokens if self.usage is not None else self.events


class Meter(Protocol):
    """Measures requests."""

    def answered(self, record: RequestRecord) -> None:
        """A request is over, answered completely, in part or not at all. Must not raise, nor keep the record."""
        ...
