"""The agent's connections that are not for blocks: asyncio streams, framed, with a deadline for every step."""

import asyncio
import contextlib
import socket
import ssl

from engine.node.settings import Peer
from transport.errors import is_shortage
from transport.node.hello import answer_to, check_reached, check_welcome
from transport.node.messages import LENGTH_BYTES, Hello, Message, NodeError, Refused, body_bytes, decode, encode

CONNECT_SECONDS = 3.0
HELLO_SECONDS = 5.0
SILENCE_SECONDS = 3.0
"""A node that says nothing for so long is gone: it beats twenty times a second."""
STALLED_SECONDS = 5.0
"""Whoever takes nothing of what is sent for so long is given up."""
PIPE_BYTES = 1 << 16
KEEP_ALIVE_SECONDS, KEEP_ALIVE_PROBES = 10, 3
"""A node that lost its power, or its network, says no goodbye: the kernel asks on an idle connection, and ends it."""

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def receive(reader: asyncio.StreamReader, seconds: float) -> Message:
    """Return the next message. Raises NodeError, also if it takes longer than `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            head = await reader.readexactly(LENGTH_BYTES)
            return decode(await reader.readexactly(body_bytes(head)))
    except TimeoutError as error:
        raise NodeError(f"nothing came for {seconds:g} s") from error
    except (OSError, EOFError) as error:
        raise NodeError(f"the connection ended: {error}") from error


async def send(writer: asyncio.StreamWriter, *messages: Message) -> None:
    """Send messages. Raises NodeError, also if the receiver takes nothing."""
    try:
        async with asyncio.timeout(STALLED_SECONDS):
            for message in messages:
                writer.write(encode(message))
                await writer.drain()
    except TimeoutError as error:
        raise NodeError("it takes nothing of what is sent") from error
    except OSError as error:
        raise NodeError(f"the connection ended: {error}") from error


async def call(peer: Peer, context: ssl.SSLContext | None, hello: Hello) -> Stream:
    """Return a connection to a node that was welcomed. Raises NodeError."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(
                peer.host, peer.port, ssl=context, server_hostname=peer.name if context is not None else None
            )
    except TimeoutError as error:
        raise NodeError(f"{peer.address} does not answer") from error
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_shortage(error):  # a thread looks names up
            raise
        raise NodeError(f"{peer.address}: {error}") from error
    _keep_alive(writer)
    try:
        check_reached(writer.get_extra_info("peername")[0], context)
        await send(writer, hello)
        check_welcome(await receive(reader, HELLO_SECONDS), peer.name)
    except NodeError as error:
        await end(writer)
        raise NodeError(f"{peer.address}: {error}") from error
    return reader, writer


async def welcome(stream: Stream, here: str, release: str) -> Hello:
    """Return what somebody who called us wants, once it was welcomed. Raises NodeError."""
    reader, writer = stream
    _keep_alive(writer)
    said = await receive(reader, HELLO_SECONDS)
    hello, answer = answer_to(said, writer.get_extra_info("ssl_object"), here, release)
    await send(writer, answer)
    if isinstance(answer, Refused):
        raise NodeError(answer.reason)
    return hello


def _keep_alive(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):  # it has ended already, which whoever uses it sees
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_ALIVE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEP_ALIVE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEP_ALIVE_PROBES)


async def end(writer: asyncio.StreamWriter) -> None:
    """Close at once."""
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def finish(writer: asyncio.StreamWriter) -> None:
    """Close once all that was written is sent, or nobody takes it any more."""
    writer.close()
    try:
        async with asyncio.timeout(STALLED_SECONDS):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()


async def pipe(one: Stream, other: Stream) -> None:
    """Pass on bytes in both directions until either side ends."""
    passing = [asyncio.create_task(_pass(one[0], other[1])), asyncio.create_task(_pass(other[0], one[1]))]
    try:
        await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(PIPE_BYTES):
            writer.write(data)
            await writer.drain()
