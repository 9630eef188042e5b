"""The agent's connections: what becomes of those whose other end is gone without a word."""

import asyncio
import socket

import pytest

from engine.node.settings import Peer
from engine.node.streams import call, end, welcome
from tests.unit.shortages import no_threads
from transport.node.messages import Hello, NodeError


async def test_the_kernel_looks_after_both_ends_of_an_idle_connection() -> None:
    kept: asyncio.Queue[tuple[int, int]] = asyncio.Queue()

    def note(writer: asyncio.StreamWriter) -> None:
        found = writer.get_extra_info("socket")
        on = found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        kept.put_nowait((on, found.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)))

    async def called(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await welcome((reader, writer), "node-a", "test")
        note(writer)
        await end(writer)

    server = await asyncio.start_server(called, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    _, writer = await call(Peer("node-a", "127.0.0.1", port), None, Hello("node-b", "requests"))
    note(writer)
    async with asyncio.timeout(20):
        for _ in range(2):
            on, idle_seconds = await kept.get()
            assert on
            assert idle_seconds <= 10
    await end(writer)
    server.close()


async def test_where_no_thread_can_look_a_name_up_the_node_is_not_reached() -> None:
    with no_threads("asyncio"), pytest.raises(NodeError, match="localhost:1: can't start new thread"):
        await call(Peer("node-a", "localhost", 1), None, Hello("node-b", "requests"))
