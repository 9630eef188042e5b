"""A node that answers garbage, with keys of its own: `python -m tests.real.nodes.garbage KEYS HOST PORT REGISTRY`."""

import contextlib
import os
import socket
import ssl
import sys
import threading
import time
from pathlib import Path

from engine.node.membership import BEAT_SECONDS, Membership
from engine.node.settings import NodeSettings
from transport.node import sockets
from transport.node.keys import server_context
from transport.node.messages import NodeError

NAME = "node-c"
PIECE_BYTES = 4096


def answer(connection: socket.socket, context: ssl.SSLContext) -> None:
    """Welcome whoever calls, and send garbage until it hangs up."""
    with contextlib.suppress(OSError, NodeError), context.wrap_socket(connection, server_side=True) as spoken:
        wire, _ = sockets.welcome(spoken, NAME, "garbage")
        while True:
            wire.send(os.urandom(PIECE_BYTES))
            time.sleep(0.01)


def listen(host: str, port: int, context: ssl.SSLContext) -> None:
    """Answer at a port."""
    listener = socket.create_server((host, port))
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection, context), daemon=True).start()


def main() -> None:
    """Be a member, and answer."""
    keys, host, port, registry = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    context = server_context(keys)
    assert context is not None
    for each in (port, port + 1):
        threading.Thread(target=listen, args=(host, each, context), daemon=True).start()
    member = Membership(NodeSettings(NAME, host, port, "", "", join=registry))
    while True:
        with contextlib.suppress(NodeError):
            member.beat()
        time.sleep(BEAT_SECONDS)


if __name__ == "__main__":
    main()
