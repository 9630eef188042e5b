"""Acts of admins in the audit log: what changes something is written down before it is done, and again with what came of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from gateway.admin.audit_chain import AuditLog
from gateway.api.endpoints import ADMIN_PATHS
from gateway.errors import ApiError, Unavailable
from gateway.http_server.request_cycle import Asgi, Receive, Scope, Send
from gateway.tenants.access import AdminAccess

READING = frozenset({"GET", "HEAD", "OPTIONS"})
_logger = logging.getLogger(__name__)


class Audited:
    """An ASGI application before the admin one. What an admin asks for is not done if it cannot be written down.

    Who may not do it is refused behind this, and not written down.
    """

    def __init__(
        self, app: Asgi, log: AuditLog, access: AdminAccess, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._app = app
        self._log = log
        self._access = access
        self._now = now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["method"] in READING or not scope["path"].startswith(ADMIN_PATHS) or not self._may(scope):
            await self._app(scope, receive, send)
            return
        client = scope.get("client")
        query = scope.get("query_string", b"").decode("latin-1")
        act = {"act": scope["method"], "path": scope["path"], "query": query, "client": client[0] if client else ""}
        act["id"] = scope.get("request_id", "")
        try:
            self.write({**act, "status": None})
        except OSError as error:
            _logger.error("the audit log cannot be written: %s", error)
            await _refuse(Unavailable("The audit log cannot be written, so nothing is done."), send)
            return
        status = 0

        async def watching(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watching)
        finally:
            try:
                self.write({**act, "status": status})
            except OSError as error:
                _logger.error("the audit log lacks what came of %s %s (%d): %s", act["act"], act["path"], status, error)

    def write(self, values: dict[str, Any]) -> None:
        """Add an entry, with the time. Raises OSError."""
        self._log.add({"time": self._now().isoformat(timespec="milliseconds"), **values})

    def _may(self, scope: Scope) -> bool:
        try:
            self._access.check(scope)
        except ApiError:
            return False
        return True


async def _refuse(error: ApiError, send: Send) -> None:
    headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    body = error.body()
    length = (b"content-length", str(len(body)).encode())
    heads = [(b"content-type", b"application/json"), length, *headers]
    await send({"type": "http.response.start", "status": error.status, "headers": heads})
    await send({"type": "http.response.body", "body": body})
