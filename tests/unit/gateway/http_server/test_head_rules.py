"""Requests whose heads parse, and what is made of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.http_server.head_rules import head_defect
from tests.unit.gateway.http_server.test_protocol import BODY, CLOSE, POST, post, said
from tests.unit.gateway.running_door import Door, running_door

HOST = (b"host", b"x")
CHUNKED = (b"transfer-encoding", b"Chunked")
GZIP = (b"transfer-encoding", b"gzip, chunked")


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        yield door


@pytest.mark.parametrize(
    ("version", "headers", "status"),
    [
        ("1.1", [HOST], None),
        ("1.1", [CHUNKED, HOST], None),
        ("1.0", [], None),
        ("1.1", [], 400),
        ("1.1", [HOST, HOST], 400),
        ("1.0", [HOST, HOST], 400),
        ("0.9", [HOST], 505),
        ("2.0", [HOST], 505),
        ("1.1", [HOST, GZIP], 501),
        ("1.1", [HOST, CHUNKED, CHUNKED], 501),
        ("1.1", [HOST, (b"transfer-encoding", b"")], 501),
    ],
)
def test_a_head_that_others_may_read_otherwise_is_refused(
    version: str, headers: list[tuple[bytes, bytes]], status: int | None
) -> None:
    defect = head_defect(version, headers)
    assert (None if defect is None else defect.status) == status


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (CLOSE.replace(b"host: localhost\r\n", b""), 400),
        (CLOSE.replace(b"host: localhost", b"host: localhost\r\nHost: localhost"), 400),
        (CLOSE.replace(b"HTTP/1.1", b"HTTP/2.0"), 505),
        (b"GET /health\r\n\r\n", 505),
        (POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    ],
    ids=["no host", "two hosts", "HTTP/2.0", "no version", "another coding"],
)
async def test_a_refused_head_is_answered_in_openai_s_form_and_costs_its_connection(
    door: Door, request_bytes: bytes, status: int
) -> None:
    answer = await said(door, request_bytes + CLOSE)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b'"code":"invalid_http"' in answer


async def test_spaces_behind_a_header_s_value_are_no_part_of_it(tmp_path: Path) -> None:
    async with running_door(tmp_path, admin_key="admin-key-1", tenants=[{"name": "a", "api_key": "key-of-a-1"}]) as door:
        await door.add_engine("replica-0")
        answer = await said(door, post(BODY, b"connection: close\r\nauthorization: Bearer key-of-a-1 \t\r\n"))
        assert answer.startswith(b"HTTP/1.1 200")


async def test_a_client_that_asks_with_a_space_behind_may_send_its_body(door: Door) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(POST + b"expect: 100-continue \r\ncontent-length: %d\r\n\r\n" % len(BODY))
    async with asyncio.timeout(10):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.close()


@pytest.mark.parametrize("url", [b"http://host", b"http://host:80", b"http://host?x=1"])
async def test_a_url_without_a_path_is_the_root(door: Door, url: bytes) -> None:
    root, other = [await said(door, CLOSE.replace(b"/health", target)) for target in (b"/", url)]
    assert other.split(b"\r\n")[0] == root.split(b"\r\n")[0]
    assert b"invalid_http" not in other


async def test_a_trailer_may_not_end_the_connection(door: Door) -> None:
    chunks = b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
    answer = await said(door, POST + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"Connection: close\r\n\r\n" + CLOSE)
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1 ") == 1
