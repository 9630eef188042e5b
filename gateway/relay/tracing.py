"""The gateway's place in a trace (W3C Trace Context): a child of the client's span, parent of the engine's."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from gateway.http_server.head_fields import HeadFields

_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_TRACESTATE = re.compile(rb"tracestate: [^\r]*\r\n")
_SAMPLED = 1


class Trace(NamedTuple):
    """Ids of a request's span and of the client's, its parent; 0 where the client has none."""

    trace_id: int
    span_id: int
    parent_id: int
    sampled: bool


def begin_trace(traceparent: bytes | None) -> Trace:
    """A span for a request with this header. What the client says of sampling holds; a trace that begins here is sampled."""
    found = _TRACEPARENT.fullmatch(traceparent or b"")
    own = int.from_bytes(os.urandom(8), "big") or 1
    if found is not None and (trace_id := int(found[1], 16)) and (parent := int(found[2], 16)):
        return Trace(trace_id, own, parent, bool(int(found[3], 16) & _SAMPLED))
    return Trace(int.from_bytes(os.urandom(16), "big") or 1, own, 0, True)


def passed_lines(fields: HeadFields, trace: Trace | None) -> bytes:
    """The headers of a request that its replica gets, with our span in place of the client's if there is one."""
    lines = fields.passed_lines
    if trace is None:
        return lines
    if fields.traceparent is not None:
        lines = lines.replace(b"traceparent: %b\r\n" % fields.traceparent, b"")
    if not trace.parent_id:  # it belongs to a trace that is not gone on with
        lines = _TRACESTATE.sub(b"", lines)
    return b"%btraceparent: 00-%032x-%016x-%02x\r\n" % (lines, trace.trace_id, trace.span_id, trace.sampled)
