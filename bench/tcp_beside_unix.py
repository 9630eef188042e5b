"""`python -m bench.tcp_beside_unix …`: vLLM's server, on a TCP port beside its unix socket.

So one engine process serves both peerkv, which uses unix sockets, and routers that only speak TCP. The variable BENCH_PORTS, a
JSON object, maps the socket's name to the port.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
from pathlib import Path

import uvicorn

from engine.host_process.preload import server_module

PORTS = "BENCH_PORTS"
_serve = uvicorn.Server.serve


async def serve(self: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
    """uvicorn's serve, with our port's socket added to those given."""
    path = Path(sys.argv[sys.argv.index("--uds") + 1])
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", json.loads(os.environ[PORTS])[path.stem]))
    await _serve(self, [*(sockets or []), listener])


if __name__ == "__main__":
    uvicorn.Server.serve = serve  # type: ignore[method-assign]
    runpy.run_module(server_module(), run_name="__main__", alter_sys=True)
