"""A request's span: a child of the client's, the parent of the engine's, and what the collector gets of it."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from gateway.errors import SettingsError
from gateway.http_server.head_fields import HeadFields
from gateway.relay.request_record import RequestRecord
from gateway.relay.tracing import begin_trace, passed_lines
from gateway.stats.traces import CLOSE_SECONDS_MAX, PROTOCOL_VARIABLE, Traces
from tests.unit.gateway.relay.relay_client import COMPLETION
from tests.unit.gateway.running_door import running_door, until

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """An OpenTelemetry collector that keeps what it gets over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: list[str] = []

    async def __aenter__(self) -> Collector:
        app = web.Application()
        app.add_routes([web.post("/v1/traces", self._take)])
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.endpoint = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1/traces"
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        for resource in ExportTraceServiceRequest.FromString(await request.read()).resource_spans:
            self.services += [each.value.string_value for each in resource.resource.attributes if each.key == "service.name"]
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return web.Response()


def said(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_collector_that_hangs_holds_the_end_up_for_a_bounded_time(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROTOCOL_VARIABLE, protocol)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        traces = Traces(f"http://127.0.0.1:{silent.getsockname()[1]}", "0.0.0")
        record = RequestRecord("chat", ended_at=time.perf_counter(), trace=begin_trace(None))
        traces.answered(record)
        began = time.monotonic()
        traces.close()
        assert time.monotonic() - began < CLOSE_SECONDS_MAX + 5.0  # an export alone may take 10 s


@pytest.mark.parametrize("stream", [False, True])
async def test_the_span_joins_the_clients_to_the_engines(tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROTOCOL_VARIABLE, "http/protobuf")
    async with Collector() as collector:
        traces = Traces(collector.endpoint, "0.0.0")
        async with running_door(tmp_path, meters=[traces], otlp_traces_endpoint=collector.endpoint) as door:
            await door.add_engine("replica-0")
            heads = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "a=1"}
            body = {**COMPLETION, "stream": stream, "stream_options": {"include_usage": True} if stream else None}
            async with door.session.post(door.url + "/v1/completions", json=body, headers=heads) as answer:
                await answer.read()
            async with door.session.post(door.url + "/v1/completions", json={"prompt": 7}) as answer:
                assert answer.status == 400
            (engine,) = (await door.seen("replica-0"))["requests"]
        await until(lambda: door.relay.records._records == [])
        await asyncio.to_thread(traces.close)
    good, bad = collector.spans
    assert collector.services == ["peerkv-gateway"] * len(collector.services)
    assert (good.trace_id.hex(), good.parent_span_id.hex()) == (TRACE, SPAN)
    assert engine["headers"]["traceparent"] == f"00-{TRACE}-{good.span_id.hex()}-01"
    assert engine["headers"]["tracestate"] == "a=1"
    told = said(good)
    assert (told["http.response.status_code"], told["peerkv.replica"], told["gen_ai.operation.name"]) == (
        200,
        "replica-0",
        "completions",
    )
    assert told["gen_ai.usage.output_tokens"] == COMPLETION["max_tokens"]
    assert 0 < good.end_time_unix_nano - good.start_time_unix_nano < 60e9
    assert COMPLETION["prompt"] not in str(told.values())
    assert (said(bad)["error.type"], bad.status.code, bad.parent_span_id) == ("invalid_type", 2, b"")


def lines(traceparent: str | None, **more: str) -> tuple[Any, str]:
    heads = [(name.encode(), value.encode()) for name, value in more.items()]
    heads += [] if traceparent is None else [(b"traceparent", traceparent.encode())]
    fields = HeadFields.of(heads)
    trace = begin_trace(fields.traceparent)
    return trace, passed_lines(fields, trace).decode()


@pytest.mark.parametrize(
    "traceparent",
    [
        None,
        "",
        "nonsense",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}",
    ],
)
def test_what_is_no_trace_begins_one(traceparent: str | None) -> None:
    trace, sent = lines(traceparent, tracestate="a=1", accept="*/*")
    assert trace.parent_id == 0
    assert trace.sampled
    assert sent == f"accept: */*\r\ntraceparent: 00-{trace.trace_id:032x}-{trace.span_id:016x}-01\r\n"


def test_what_the_client_does_not_sample_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, sent = lines(f"00-{TRACE}-{SPAN}-00", tracestate="a=1")
    assert not trace.sampled
    assert sent.endswith(f"traceparent: 00-{TRACE}-{trace.span_id:016x}-00\r\n")
    assert "tracestate: a=1\r\n" in sent


def test_without_a_trace_the_headers_stay(tmp_path: Path) -> None:
    fields = HeadFields.of([(b"traceparent", b"x"), (b"tracestate", b"a=1")])
    assert passed_lines(fields, None) == b"traceparent: x\r\ntracestate: a=1\r\n"


def test_missing_packages_and_wrong_protocols_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROTOCOL_VARIABLE, "udp")
    with pytest.raises(SettingsError, match="there are grpc and http/protobuf"):
        Traces("http://127.0.0.1:1", "0")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with pytest.raises(SettingsError, match=r"pip install -e '\.\[otel\]'"):
        Traces("http://127.0.0.1:1", "0")
