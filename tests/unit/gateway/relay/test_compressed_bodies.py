"""Bodies with a content-encoding: gzip is decoded within the bounds, anything else is refused."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.http_server.content_encoding import INLINE_BYTES_MAX
from tests.unit.gateway.running_door import Door, running_door

COMPLETION = {"model": "fake-model", "prompt": "hello", "max_tokens": 1}
BODY_BYTES_MAX = 1 << 20


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with running_door(tmp_path, body_bytes_max=BODY_BYTES_MAX, bodies_bytes_max=BODY_BYTES_MAX) as door:
        await door.add_engine("replica-0")
        yield door


async def post(door: Door, data: bytes, encoding: str = "gzip") -> tuple[int, Any, Any]:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    return await door.post("/v1/completions", data=data, json=None, headers=headers)


def text(size: int) -> bytes:
    """A body of about `size` bytes that gzip cannot make much smaller."""
    return json.dumps(COMPLETION | {"user": random.Random(1).randbytes(size // 2).hex()}).encode()


@pytest.mark.parametrize("size", [100, INLINE_BYTES_MAX * 2])
@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", " GZip "])
async def test_a_gzip_body_reaches_the_engine_decoded(door: Door, size: int, encoding: str) -> None:
    body = text(size)
    assert (await post(door, gzip.compress(body), encoding))[0] == 200
    seen = (await door.seen("replica-0"))["requests"][0]
    assert seen["body"]["user"] == json.loads(body)["user"]
    assert "content-encoding" not in seen["headers"]


async def test_identity_is_no_compression(door: Door) -> None:
    assert (await post(door, text(100), "identity"))[0] == 200


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip", "x"])
async def test_other_encodings_are_415_and_say_what_is_taken(door: Door, encoding: str) -> None:
    status, body, headers = await post(door, text(100), encoding)
    assert (status, body["error"]["code"]) == (415, "unsupported_content_encoding")
    assert headers["accept-encoding"] == "gzip, identity"


async def test_a_bomb_is_413_before_it_is_decoded(door: Door) -> None:
    status, body, _ = await post(door, gzip.compress(b" " * (BODY_BYTES_MAX + 1)))
    assert (status, body["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x1f\x8b",
        b"not gzip at all",
        gzip.compress(text(100))[:-9],
        gzip.compress(text(100)) + b"x",
        gzip.compress(text(100)) + gzip.compress(b"{}"),
        gzip.compress(b" " * 100_000)[:-4] + (10).to_bytes(4, "little"),  # says that it is short
        gzip.compress(b"{}")[:-4] + (1000).to_bytes(4, "little"),
    ],
    ids=["empty", "a beginning", "no gzip", "cut off", "more behind", "two members", "longer", "shorter"],
)
async def test_what_is_no_gzip_of_the_length_that_it_says_is_400(door: Door, data: bytes) -> None:
    status, body, _ = await post(door, data)
    # The last bytes of what is none may say any length.
    assert (status, body["error"]["code"]) in ((400, "invalid_gzip"), (413, "body_too_large"))
    assert (await door.seen("replica-0"))["requests"] == []


async def test_the_decoded_bytes_are_counted_and_given_back(door: Door) -> None:
    body = gzip.compress(json.dumps(COMPLETION | {"user": " " * (BODY_BYTES_MAX - 2000)}).encode())
    for _ in range(3):
        assert (await post(door, body))[0] == 200
    assert door.relay._held_bytes == 0


@pytest.mark.parametrize("path", ["/v1/completions/", "/v1/chat/completions/", "/v1/models/"])
async def test_a_slash_behind_a_path_changes_nothing(door: Door, path: str) -> None:
    body = COMPLETION | {"messages": [{"role": "user", "content": "x"}]}
    for _ in range(2):
        answer = await (door.get(path) if path == "/v1/models/" else door.post(path, body))
        assert answer[0] == 200
    paths = [request["path"] for request in (await door.seen("replica-0"))["requests"]]
    assert all(not path.endswith("/") for path in paths)
