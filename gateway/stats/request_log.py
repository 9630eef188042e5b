"""The request log: a line of JSON for each request of /v1, without prompts, answers and keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import msgspec
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.relay.request_record import RequestRecord
from gateway.stats.log_file import LogFile
from gateway.stats.request_times import first_token_seconds, queue_seconds
from gateway.stats.token_sources import token_sources


class RequestLine(msgspec.Struct, gc=False):
    """One line. Fields that are not known, or do not apply, are null.

    `time` is when the request came. Seconds are since then, but for `queue_seconds`, which it waited in the engine. `replica`
    is the last one that was tried, of `attempts`. Of the prompt's tokens, `cached_tokens` were not computed: they are the sum
    of the local ones, those imported from a peer and those restored from host memory, disk or vault, out of `source`.
    `estimated` says that completion tokens are counted by a stream's events. `status` is 499 if the client left, 0 if it got
    nothing.
    """

    time: datetime
    id: str
    tenant: str | None
    endpoint: str
    model: str | None
    replica: str | None
    attempts: int
    stream: bool
    status: int
    error: str | None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    local_tokens: int | None = None
    peer_tokens: int | None = None
    host_memory_tokens: int | None = None
    disk_tokens: int | None = None
    vault_tokens: int | None = None
    computed_tokens: int | None = None
    source: str | None = None
    completion_tokens: int | None = None
    estimated: bool = False
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    seconds: float = 0.0


class RequestLog(Collector):
    """Writes requests to a file. Belongs to the event loop's thread.

    `wall_clock` gives Unix time and `clock` that of the records, both in seconds.
    """

    def __init__(
        self,
        file: LogFile,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._file = file
        self._wall_clock = wall_clock
        self._clock = clock
        self._encode = msgspec.json.Encoder().encode

    def answered(self, record: RequestRecord) -> None:
        """Have the request's line written."""
        ended_at = self._wall_clock() - (self._clock() - record.ended_at)
        self._file.put(self._encode(request_line(record, ended_at)) + b"\n")

    def collect(self) -> Iterator[Metric]:
        """Return how many lines were written, and how many were not."""
        yield CounterMetricFamily("peerkv_request_log_lines", "Lines written to the request log.", value=self._file.written)
        yield CounterMetricFamily(
            "peerkv_request_log_dropped_lines",
            "Lines of the request log that could not be written: the disk is full, or too slow.",
            value=self._file.dropped,
        )


def request_line(record: RequestRecord, ended_at: float) -> RequestLine:
    """What is logged of a request that ended then, in Unix time."""
    attempt, usage = record.attempt, record.usage
    line = RequestLine(
        time=datetime.fromtimestamp(ended_at - record.seconds, UTC),
        id=record.request_id,
        tenant=record.tenant or None,
        endpoint=record.endpoint,
        model=record.model or None,
        replica=None if attempt is None else attempt.decision.replica,
        attempts=record.attempts,
        stream=record.streamed,
        status=record.status,
        error=record.error or None,
        seconds=round(record.seconds, 6),
    )
    if usage is not None or record.events:
        line.completion_tokens, line.estimated = record.completion_tokens, usage is None
    if attempt is None:
        return line
    sources = token_sources(attempt)
    if sources is not None:
        line.local_tokens, line.peer_tokens, line.computed_tokens = sources.local, sources.peer, sources.computed
        line.host_memory_tokens, line.disk_tokens, line.vault_tokens = sources.host_memory, sources.disk, sources.vault
        line.source, line.cached_tokens = sources.source or None, sources.cached
    if usage is not None:
        line.prompt_tokens = usage.prompt_tokens
    else:
        line.prompt_tokens = sum([one.prompt_tokens for one in attempt.deliveries]) or attempt.prompt_tokens or None
    line.queue_seconds, line.first_token_seconds = _rounded(queue_seconds(record)), _rounded(first_token_seconds(record))
    return line


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
