"""Spans of requests, sent to an OpenTelemetry collector: the extra `otel`."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import msgspec

from gateway.errors import SettingsError
from gateway.ledger.ledger import LEFT_STATUS
from gateway.relay.request_record import RequestRecord
from gateway.stats.token_sources import token_sources

PROTOCOL_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
"""As vLLM reads it: "grpc", which is the default, or "http/protobuf"."""
CLOSE_SECONDS_MAX = 2.0
_NANOSECONDS = 1_000_000_000
SERVICE = "peerkv-gateway"


class Traces:
    """Makes a span of each sampled request that is over. A thread of OpenTelemetry's sends them; what it cannot send is lost.

    Raises SettingsError without the packages, or for a protocol that there is not.
    """

    def __init__(self, endpoint: str, version: str) -> None:
        try:
            from opentelemetry.sdk import trace as sdk
            from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope

            exporter = _exporter(endpoint)
        except ImportError as error:
            how = ".venv/bin/pip install -e '.[otel]' in the clone"
            raise SettingsError(f"otlp_traces_endpoint needs more packages: {how} ({error})") from None
        self._sdk = sdk
        self._processor = BatchSpanProcessor(exporter)
        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: SERVICE}
        self._resource = Resource.create({**named, SERVICE_VERSION: version})
        self._scope = InstrumentationScope("peerkv", version)

    def answered(self, record: RequestRecord) -> None:
        """A request is over."""
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        trace = record.trace
        if trace is None or not trace.sampled:
            return

        def context(span_id: int, *, remote: bool = False) -> SpanContext:
            return SpanContext(trace.trace_id, span_id, remote, TraceFlags(TraceFlags.SAMPLED))

        ended = time.time_ns() - round((time.perf_counter() - record.ended_at) * _NANOSECONDS)
        failed = bool(record.error) or record.status >= 500
        span = self._sdk.ReadableSpan(
            name=f"peerkv {record.endpoint}",
            context=context(trace.span_id),
            parent=context(trace.parent_id, remote=True) if trace.parent_id else None,
            resource=self._resource,
            attributes=attributes(record),
            kind=SpanKind.SERVER,
            instrumentation_scope=self._scope,
            status=Status(StatusCode.ERROR, record.error or None) if failed else Status(StatusCode.UNSET),
            start_time=ended - round(record.seconds * _NANOSECONDS),
            end_time=ended,
        )
        self._processor.on_end(span)

    def close(self) -> None:
        """Send what waits, for a bounded time: the processor's own bounds are not kept to while an export goes on."""
        ending = threading.Thread(target=self._processor.shutdown, name="peerkv-traces", daemon=True)
        ending.start()
        ending.join(CLOSE_SECONDS_MAX)


def attributes(record: RequestRecord) -> dict[str, Any]:
    """What a span says of its request: never prompts, answers or keys."""
    found: dict[str, Any] = {
        "gen_ai.operation.name": record.endpoint,
        "gen_ai.request.model": record.model,
        "http.response.status_code": record.status,
        "peerkv.request_id": record.request_id,
        "peerkv.tenant": record.tenant,
        "peerkv.attempts": record.attempts,
        "peerkv.streamed": record.streamed,
        "peerkv.client_left": record.status == LEFT_STATUS,
    }
    if record.error:
        found["error.type"] = record.error
    if record.first_byte_seconds is not None:
        found["peerkv.first_byte_seconds"] = record.first_byte_seconds
    if record.usage is not None:
        found |= {
            "gen_ai.usage.input_tokens": record.usage.prompt_tokens,
            "gen_ai.usage.output_tokens": record.usage.completion_tokens,
        }
    if record.attempt is not None:
        found["peerkv.replica"] = record.attempt.replica
        sources = token_sources(record.attempt)
        if sources is not None:
            found |= {f"peerkv.tokens.{name}": value for name, value in msgspec.structs.asdict(sources).items()}
    return found


def _exporter(endpoint: str) -> Any:
    protocol = os.environ.get(PROTOCOL_VARIABLE) or "grpc"
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https:"))
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter(endpoint=endpoint)
    raise SettingsError(f"{PROTOCOL_VARIABLE} is '{protocol}': there are grpc and http/protobuf")
