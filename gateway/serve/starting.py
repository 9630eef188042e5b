"""What is served until the front door is wired: the gateway is alive but not ready."""

from __future__ import annotations

from collections.abc import Awaitable

from gateway.admin.health import READY_RETRY_SECONDS, Health, Readiness
from gateway.errors import Unavailable
from gateway.http_server.request_cycle import Asgi, Receive, Scope, Send
from gateway.http_server.transaction import JSON_LINE, Transaction


class StartingDoor:
    """Answers /health and /ready, and everything else with 503. `reason` says what the gateway is waiting for."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Transaction(scope)
        if scope["path"] == "/health":
            exchange.answer(200, JSON_LINE, Health().model_dump_json().encode())
        elif scope["path"] == "/ready":
            body = Readiness(ready=False, reason=self.reason, model="", warnings=[], replicas=[]).model_dump_json().encode()
            exchange.answer(503, JSON_LINE + b"retry-after: %d\r\n" % READY_RETRY_SECONDS, body)
        else:
            exchange.fail(Unavailable(f"The gateway is {self.reason}.", retry_after_seconds=READY_RETRY_SECONDS))


class Switch:
    """An ASGI application that delegates to another one, which can be replaced."""

    def __init__(self, app: Asgi) -> None:
        self.app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        return self.app(scope, receive, send)
