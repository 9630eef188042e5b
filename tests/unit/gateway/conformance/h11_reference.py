"""What h11 understands: the reference of what is acceptable."""

from __future__ import annotations

import h11

from tests.unit.gateway.conformance.understood import BROKEN, Answer, End, Request, Requests, cut_target, header_values

_INCOMPLETE_BYTES_MAX = 1 << 20  # far above any head here: bounds are tested for themselves


def requests_by_h11(stream: bytes) -> Requests:
    """The requests in a client's stream, each of them answered."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_INCOMPLETE_BYTES_MAX)
    connection.receive_data(stream)
    whole: list[Request] = []
    head, body = None, b""
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError:
            return Requests(tuple(whole), End.REFUSED)
        if isinstance(event, h11.Request):
            head, body = event, b""
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            path, query = cut_target(head.target)
            whole.append(Request(head.method, path, query, head.http_version, header_values(head.headers), body))
            if head.method == b"CONNECT":
                return Requests(tuple(whole), End.CLOSED)
            connection.send(h11.Response(status_code=200, headers=[(b"content-length", b"0")]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is not h11.DONE:
                return Requests(tuple(whole), End.CLOSED)
            connection.start_next_cycle()
        else:
            return Requests(tuple(whole), End.OPEN)


def answer_by_h11(stream: bytes, *, ends: bool, method: bytes = b"POST", closing: bool = False) -> tuple[Answer | str, bytes]:
    """The answer to one request that a server's stream begins with, and what follows it.

    The connection ends behind the stream if it `ends`; else an answer that is not whole is none. A request that is `closing`
    says that it is the connection's last.
    """
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_INCOMPLETE_BYTES_MAX)
    length = [(b"content-length", b"0")] if method == b"POST" else []
    close = [(b"connection", b"close")] if closing else []
    connection.send(h11.Request(method=method, target=b"/", headers=[(b"host", b"x"), *length, *close]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(stream)
    if ends:
        connection.receive_data(b"")
    head, body = None, b""
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError:
            return BROKEN, b""
        if isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            rest = connection.trailing_data[0]
            reusable = connection.their_state is h11.DONE and not rest and not ends
            return Answer(head.status_code, header_values(head.headers), body, reusable), rest
        elif not isinstance(event, h11.InformationalResponse):
            return BROKEN, b""
