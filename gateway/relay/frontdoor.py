"""The ASGI application: `/v1/*`, and what vLLM has beside it, goes to the relay, everything else to the admin application."""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from functools import partial
from typing import Any

import msgspec

from gateway.api.endpoints import PATHS
from gateway.errors import InternalError, MethodNotAllowed, UnknownPath
from gateway.http_server.request_cycle import Asgi, Receive, Scope, Send
from gateway.http_server.transaction import JSON_LINE, Transaction
from gateway.limits.limiter import Limiter
from gateway.limits.refusals import NoSuchModel
from gateway.relay.relay import Relay
from gateway.relay.request_record import RequestRecord
from gateway.relay.served_fleets import ServedFleets
from gateway.tenants.access import caller
from gateway.tenants.tenants import Tenants

_logger = logging.getLogger(__name__)

MODELS_PATH = "/v1/models"
OTHER_LABEL = "models"


class FrontDoor:
    """Dispatches by path. Serves the list of models itself, from the replicas' own answer."""

    def __init__(
        self, *, relay: Relay[Any], fleets: ServedFleets[Any], tenants: Tenants, limiter: Limiter, admin: Asgi
    ) -> None:
        self._relay = relay
        self._fleets = fleets
        self._tenants = tenants
        self._limiter = limiter
        self._admin = admin

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """ASGI entry. Scopes other than "http" are not served."""
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        path: str = scope["path"]
        endpoint = PATHS.get(path)
        if endpoint is None and path.endswith("/") and path != "/":  # vLLM sends clients on, from there to the path without
            path = scope["path"] = path[:-1]
            endpoint = PATHS.get(path)
        if endpoint is not None and scope["method"] == "POST":
            return self._relay(endpoint, scope)
        if endpoint is not None or path == "/v1" or path.startswith("/v1/"):
            transaction = Transaction(scope)
            return self._relay.guard(RequestRecord(OTHER_LABEL), transaction, self._serve_v1(transaction))
        return self._serve_admin(scope, receive, send)

    async def _serve_v1(self, transaction: Transaction) -> None:
        key = caller(self._tenants, transaction.scope, transaction.fields.authorization, transaction.fields.host).key
        if key is not None:
            transaction.more_lines = partial(self._limiter.header_lines, key)
        self._relay.take_slot(transaction)
        method, path = transaction.scope["method"], transaction.scope["path"]
        is_models = path == MODELS_PATH or path.startswith(MODELS_PATH + "/")
        if path in PATHS:
            raise MethodNotAllowed(method, path, ["POST"])
        if not is_models:
            raise UnknownPath(method, path)
        if method != "GET":
            raise MethodNotAllowed(method, path, ["GET"])
        allowed = key.models if key is not None else ()
        name = path[len(MODELS_PATH) + 1 :]
        if path != MODELS_PATH:
            if allowed and name not in allowed:
                raise NoSuchModel(name)
            body = msgspec.json.encode(await (await self._fleets.find(name)).models.card(name))
        else:
            body = await self._fleets.listed(allowed)
        transaction.answer(200, JSON_LINE, body)

    async def _serve_admin(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The admin application answers its own errors. Anything else that it raises is a defect."""
        transaction = Transaction(scope)
        scope["request_id"] = transaction.request_id

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                transaction.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", transaction.request_id.encode())]
            await send(message)

        try:
            await self._admin(scope, receive, send_with_id)
        except Exception:
            self._relay.counters.internal_errors += 1
            _logger.exception("request %s failed", transaction.request_id)
            if not transaction.begun:
                transaction.fail(InternalError(transaction.request_id))
