"""Heads whose bodies do not come: whoever sends them, others are served."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from gateway.errors import ApiError
from gateway.relay.uploads import Uploads
from gateway.settings import Tenant
from tests.unit.gateway.running_door import Door, running_door, until

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
BODY = json.dumps({"model": "fake-model", "prompt": "hello", "max_tokens": 1}).encode()
UPLOADS_MAX = 16
KEYS = tuple(Tenant(name=name, api_key=SecretStr(f"key-of-{name}-1")) for name in "ab")


class Upload:
    """A request whose head was sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self._reader = reader

    async def status(self) -> int:
        async with asyncio.timeout(15):
            return int((await self._reader.readline()).split()[1])


@contextlib.asynccontextmanager
async def uploads(door: Door, count: int, line: bytes = b"") -> AsyncIterator[list[Upload]]:
    """So many heads without bodies, one behind the other."""
    begun: list[Upload] = []
    try:
        for _ in range(count):
            upload = Upload(*await asyncio.open_connection("127.0.0.1", door.port))
            before = door.relay.counters.requests
            upload.writer.write(HEAD + line + b"content-length: %d\r\n\r\n" % len(BODY))
            await until(lambda before=before: door.relay.counters.requests > before)  # type: ignore[misc]
            begun.append(upload)
        yield begun
    finally:
        for upload in begun:
            upload.writer.close()


@contextlib.asynccontextmanager
async def slow_uploads(door: Door, count: int, line: bytes = b"", size: int = 100_000) -> AsyncIterator[list[Upload]]:
    """Requests of whose bodies `size` bytes came, of the first one a few less, and all but the end is missing."""
    begun: list[Upload] = []
    try:
        for number in range(count):
            sent = size - 1000 * (count - number - 1)
            upload = Upload(*await asyncio.open_connection("127.0.0.1", door.port))
            before = door.relay._held_bytes
            length = sent + 10 + len(BODY)
            upload.writer.write(HEAD + line + b"content-length: %d\r\n\r\n" % length + b" " * sent)
            await until(lambda before=before, sent=sent: door.relay._held_bytes == before + sent)  # type: ignore[misc]
            begun.append(upload)
        yield begun
    finally:
        for upload in begun:
            upload.writer.close()


async def test_heads_without_bodies_take_no_request_its_place(tmp_path: Path) -> None:
    async with running_door(tmp_path, uploads_max=UPLOADS_MAX, requests_in_flight_max=2) as door:
        await door.add_engine("replica-0")
        async with uploads(door, UPLOADS_MAX) as held:
            for _ in range(UPLOADS_MAX):  # by a client that sends head and body apart
                assert (await door.post("/v1/completions", json.loads(BODY)))[0] == 200
            assert (await door.get("/v1/models"))[0] == 200
            held[-1].writer.write(BODY)
            assert await held[-1].status() == 200


async def test_of_too_many_uploads_the_one_of_which_nothing_came_for_longest_ends(tmp_path: Path) -> None:
    async with running_door(tmp_path, uploads_max=UPLOADS_MAX) as door:
        await door.add_engine("replica-0")
        async with uploads(door, UPLOADS_MAX) as held:
            taken = door.relay._held_bytes
            held[0].writer.write(BODY[:1])
            await until(lambda: door.relay._held_bytes > taken)
            async with uploads(door, 1):
                assert await held[1].status() == 408
                for upload in (held[0], held[-1]):
                    upload.writer.write(BODY[1:] if upload is held[0] else BODY)
                    assert await upload.status() == 200


async def test_a_tenants_uploads_cost_no_other_tenant_one(tmp_path: Path) -> None:
    async with running_door(tmp_path, uploads_max=UPLOADS_MAX, tenants=KEYS) as door:
        await door.add_engine("replica-0")
        of_b, of_a = (b"authorization: Bearer key-of-%b-1\r\n" % name for name in (b"b", b"a"))
        async with uploads(door, 2, of_b) as others, uploads(door, 3 * UPLOADS_MAX, of_a) as many:
            assert await many[0].status() == 408
            for other in others:
                other.writer.write(BODY)
                assert await other.status() == 200


async def test_uploads_that_end_in_any_way_are_no_longer_counted(tmp_path: Path) -> None:
    async with running_door(tmp_path, uploads_max=UPLOADS_MAX, body_seconds_max=0.5) as door:
        await door.add_engine("replica-0")
        async with uploads(door, 3) as held:
            assert len(door.relay._uploads) == 3
            held[0].writer.write(BODY)
            assert await held[0].status() == 200
            held[1].writer.close()
            assert await held[2].status() == 408
        await until(lambda: len(door.relay._uploads) == door.relay.in_flight == door.relay._held_bytes == 0)


async def test_slow_uploads_do_not_keep_all_the_room_for_bodies(tmp_path: Path) -> None:
    async with running_door(tmp_path, bodies_bytes_max=300_000, body_bytes_max=200_000) as door:
        await door.add_engine("replica-0")
        async with slow_uploads(door, 2) as slow:
            large = {**json.loads(BODY), "user": "u" * 150_000}
            assert (await door.post("/v1/completions", large))[0] == 200
            assert await slow[0].status() == 408  # which sent less, in more time
            slow[1].writer.write(b" " * 10 + BODY)
            assert await slow[1].status() == 200
        await until(lambda: door.relay._held_bytes == 0)


async def test_a_tenants_slow_uploads_cost_no_other_tenant_its_own(tmp_path: Path) -> None:
    async with running_door(tmp_path, bodies_bytes_max=300_000, body_bytes_max=200_000, tenants=KEYS) as door:
        await door.add_engine("replica-0")
        of_b, of_a = (b"authorization: Bearer key-of-%b-1\r\n" % name for name in (b"b", b"a"))
        async with slow_uploads(door, 1, of_b, 50_000) as others, slow_uploads(door, 2, of_a) as many:
            large = {**json.loads(BODY), "user": "u" * 60_000}
            assert (await door.post("/v1/completions", large, headers={"authorization": "Bearer key-of-b-1"}))[0] == 200
            assert await many[0].status() == 408
            others[0].writer.write(b" " * 10 + BODY)
            assert await others[0].status() == 200


class Sent:
    """A transaction of whose body so many bytes came since `came_at`; `ended` has the error that ended it."""

    def __init__(self, body_bytes: int, came_at: float = 0.0) -> None:
        self.body_bytes = body_bytes
        self.came_at = came_at
        self.ended: list[ApiError] = []
        self.end = self.ended.append


def uploading(**by_caller: list[Sent]) -> Any:
    found: Any = Uploads(UPLOADS_MAX)
    for caller, sent in by_caller.items():
        for each in sent:
            found.begin(caller, each)
    return found


def test_the_slowest_upload_of_who_holds_most_makes_room() -> None:
    slow, quick, others = Sent(100), Sent(100, 50.0), Sent(150)
    held = uploading(a=[slow, quick], b=[others])
    assert held.make_room(60, 100.0) == 100
    assert [len(each.ended) for each in (slow, quick, others)] == [1, 0, 0]
    assert slow.ended[0].status == 408
    assert (slow.body_bytes, len(held)) == (0, 2)
    assert held.make_room(160, 100.0) == 250  # b holds most now, and that is not enough
    assert len(held) == 0


def test_no_upload_ends_if_all_of_them_would_not_be_enough() -> None:
    sent = [Sent(100), Sent(0)]
    held = uploading(a=sent)
    assert held.make_room(101, 1.0) == 0
    assert not any(each.ended for each in sent)
    assert len(held) == 2


def test_no_upload_ends_for_one_that_would_have_to_give_way_itself() -> None:
    asking, quick, small = Sent(100), Sent(100, 99.0), Sent(50)
    held = uploading(a=[asking, quick], b=[small])
    assert held.make_room(10, 100.0, asking) == 0  # type: ignore[arg-type]
    assert held.make_room(210, 100.0, asking) == 0  # type: ignore[arg-type]
    assert not any(each.ended for each in (asking, quick, small))
    assert held.make_room(10, 100.0, small) == 100  # type: ignore[arg-type]
    assert asking.ended


async def test_ids_that_are_held_beside_a_body_are_counted(tmp_path: Path) -> None:
    async with running_door(tmp_path, bodies_bytes_max=300_000) as door:
        await door.add_engine("replica-0")
        planner: Any = door.planner
        planner.held_bytes = 200_000
        slow = {**json.loads(BODY), "fake": {"delay": 30}}
        asked = asyncio.create_task(door.post("/v1/completions", slow))
        await until(lambda: door.relay._held_bytes > 200_000)
        assert (await door.post("/v1/completions", json.loads(BODY)))[0] == 503
        asked.cancel()
        await until(lambda: door.relay._held_bytes == 0)
