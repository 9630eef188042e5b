"""When a request's first token came and how long the engine made it wait, by the engine's record where that knows it better."""

from __future__ import annotations

from gateway.relay.request_record import RequestRecord

_NS = 1e-9


def queue_seconds(record: RequestRecord) -> float | None:
    """From the request's arrival in the engine to its first step; None if that is not known."""
    steered = record.attempt.steered if record.attempt is not None else None
    if steered is None or not steered.scheduled_ns:
        return None
    return (steered.scheduled_ns - steered.arrived_ns) * _NS


def first_token_seconds(record: RequestRecord) -> float | None:
    """From the request's arrival here to its first token; None if there was none, or that is not known.

    A stream's first token is its first event, as the client gets it. Of an answer that comes whole the engine knows when it
    had the first token: its records and time.perf_counter have the same clock, CLOCK_MONOTONIC.
    """
    if record.streamed:
        return record.first_byte_seconds if record.status == 200 or record.events or record.usage else None
    steered = record.attempt.steered if record.attempt is not None else None
    if steered is None or not steered.first_token_ns:
        return None
    return max(0.0, record.seconds - (record.ended_at - steered.first_token_ns * _NS))
