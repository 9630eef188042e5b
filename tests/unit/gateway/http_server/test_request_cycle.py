"""What is written for an answer."""

from __future__ import annotations

from itertools import product

import pytest

from gateway.http_server.request_cycle import RequestCycle

BODY = b"hello"


class Line:
    """A connection that tells what was asked of it."""

    write_paused = False

    def __init__(self) -> None:
        self.got = b""
        self.told: list[object] = []

    def write(self, data: bytes) -> None:
        self.got += data

    def close(self) -> None:
        self.told.append("close")

    def resume_reading(self) -> None: ...

    def answered(self) -> None:
        self.told.append("answered")

    def date_head(self) -> bytes:
        return b"date: today\r\n"

    def note(self, cycle: RequestCycle, status: int) -> None:
        self.told.append(status)

    async def drained(self) -> None: ...


@pytest.mark.parametrize(
    ("status", "method", "keep_alive", "expects", "left"),
    list(product([200, 204, 304, 404, 599], ["POST", "HEAD"], [True, False], [True, False], [True, False])),
)
def test_a_whole_answer_is_what_its_parts_would_be(
    status: int, method: str, keep_alive: bool, expects: bool, left: bool
) -> None:
    ends = []
    for at_once in (True, False):
        line = Line()
        cycle = RequestCycle(line, {"method": method, "http_version": "1.1"}, keep_alive=keep_alive, expects_continue=expects)
        if left:
            cycle.client_left()
        if at_once:
            cycle.answer(status, b"x-a: b\r\ncontent-length: 5\r\n", BODY)
        else:
            cycle.start(status, [(b"x-a", b"b"), (b"content-length", b"5")])
            cycle.end(BODY)
        ends.append((line.got, line.told, cycle.begun, cycle.complete, cycle.keep_alive))
        with pytest.raises(RuntimeError):
            cycle.answer(status, b"", BODY)
    assert ends[0] == ends[1]
    assert ends[0][0].endswith(BODY) == (not left and method != "HEAD" and status not in (204, 304))
