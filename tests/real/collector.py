"""A collector of OpenTelemetry's that keeps the spans it gets."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

ENVIRONMENT = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "100"}
"""Has those that send spans use HTTP, as the collector does, and wait for 100 ms at most."""
END_SECONDS_MAX = 10.0


class Collector:
    """Listens on loopback while its block runs."""

    def __init__(self) -> None:
        self._spans: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector._take(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(END_SECONDS_MAX)

    def _take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self._spans += [span for scope in resource.scope_spans for span in scope.spans]

    def named(self, name: str, trace: str) -> list[Any]:
        """The spans whose names begin so, of the trace whose id is that in hexadecimal digits."""
        return [span for span in self._spans if span.name.startswith(name) and span.trace_id.hex() == trace]
