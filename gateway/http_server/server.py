"""The HTTP server: uvicorn with the front door's own protocol, and without signal handlers of its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator
from typing import Any

import uvicorn

from gateway.errors import SettingsError
from gateway.http_server.certificate import Certificate
from gateway.http_server.cors import Cors
from gateway.http_server.protocol import DoorProtocol
from gateway.settings import Settings

BACKLOG = 2048
# Beyond drain_seconds, for connections whose clients do not read their last bytes.
SHUTDOWN_GRACE_SECONDS = 5
HANDSHAKE_SECONDS_MAX = 10.0
"""Until then a connection is none of those that are counted, and has no request that could be answered."""


class DoorServer(uvicorn.Server):
    """uvicorn's server; whoever runs it handles the signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which does not bound TLS handshakes."""
        if self.config.ssl is None:
            await super().startup(sockets)
            return
        await super().startup([])
        loop = asyncio.get_running_loop()
        for listener in sockets or ():
            self.servers.append(
                await loop.create_server(
                    self._protocol,
                    sock=listener,
                    ssl=self.config.ssl,
                    ssl_handshake_timeout=HANDSHAKE_SECONDS_MAX,
                    backlog=self.config.backlog,
                )
            )

    def _protocol(self) -> asyncio.Protocol:
        found: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return found


def build_server(app: Any, settings: Settings, certificate: Certificate | None = None) -> DoorServer:
    """A server for `app`, that speaks TLS if it has a `certificate`; run it with `serve(sockets=[…])`."""
    protocol = type(
        "BoundDoorProtocol",
        (DoorProtocol,),
        {
            "connections_max": settings.connections_max,
            "strangers": {},
            "head_bytes_max": settings.header_bytes_max,
            "head_seconds_max": settings.keep_alive_seconds,
            "stall_seconds_max": settings.client_stall_seconds_max,
            "access_log": settings.access_log,
        },
    )
    config = uvicorn.Config(
        Cors(app, settings.cors_origins) if settings.cors_origins else app,
        http=protocol,
        interface="asgi3",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=settings.access_log,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=max(1, round(settings.keep_alive_seconds)),
        timeout_graceful_shutdown=round(settings.drain_seconds) + SHUTDOWN_GRACE_SECONDS,
    )
    if certificate is not None:
        config.load()
        config.ssl = certificate.context
    return DoorServer(config)


def bind(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """A socket that listens on the address; with `reuse_port` several processes may have one.

    Raises SettingsError when the address is not available.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise SettingsError(f"cannot listen on host '{host}': {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"cannot listen on {host} port {port}: {error.strerror}. Stop what uses it, or choose another --port."
        ) from None
    listener.setblocking(False)
    return listener
