"""Keys with limits over two real front doors that share a Valkey server: exact together, and never stopped by it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.tenants.key_file import write_keys
from gateway.tenants.keys import Key, no_keys
from tests.unit.engine.frame_tiers.vault_servers import Server, valkey
from tests.unit.gateway.limits.limited_keys import limited
from tests.unit.gateway.relay.relay_client import COMPLETION
from tests.unit.gateway.running_door import Door, running_door, until

CLIENTS = 64
WAIT_SECONDS_MAX = 15.0
"""A request that waits for a server that is there waits for less, however busy the machine is."""
HELD = {"held": True}
PROMPT_TOKENS = len(COMPLETION["prompt"])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with valkey(tmp_path, password="") as made:
        yield made


@contextlib.asynccontextmanager
async def two_doors(
    directory: Path, server: Server, *keys: Key, let_go: asyncio.Event | None = None
) -> AsyncIterator[tuple[Door, Door]]:
    """Front doors with one fake engine each and the same keys; the token of each is its name.

    What is asked to be HELD is answered once `let_go` is set.
    """
    content = no_keys()
    for key in keys:
        content = content.with_key(key)
    path = directory / "keys.toml"
    write_keys(path, content)
    url = SecretStr(f"valkey://127.0.0.1:{server.address.port}")
    async with contextlib.AsyncExitStack() as stack:
        doors = []
        for name in ("one", "two"):
            (directory / name).mkdir()
            running = running_door(
                directory / name, keys_file=path, limits_valkey=url, limits_valkey_wait_seconds_max=WAIT_SECONDS_MAX
            )
            doors.append(await stack.enter_async_context(running))
            engine = await doors[-1].add_engine("replica-0")
            engine.let_go = let_go or engine.let_go
        try:
            yield doors[0], doors[1]
        finally:
            if let_go is not None:
                let_go.set()  # so that a test that fails ends, too


async def ask(door: Door, token: str = "a", **extra: Any) -> tuple[int, Any]:
    async with door.session.post(
        door.url + "/v1/completions", json=COMPLETION | extra, headers={"authorization": f"Bearer {token}"}
    ) as answer:
        await answer.read()
        return answer.status, answer.headers


def clients(doors: tuple[Door, Door], each: int, **extra: Any) -> list[asyncio.Task[list[int]]]:
    """CLIENTS clients that ask so often, one door and then the other, with what they get."""

    async def client(number: int) -> list[int]:
        return [(await ask(doors[(number + turn) % 2], **extra))[0] for turn in range(each)]

    return [asyncio.create_task(client(number)) for number in range(CLIENTS)]


async def counted(asking: list[asyncio.Task[list[int]]]) -> Counter[int]:
    """How often they get which status."""
    return Counter(status for found in await asyncio.gather(*asking) for status in found)


async def running(doors: tuple[Door, Door]) -> int:
    """How many requests the engines have."""
    return sum([int((await door.seen("replica-0"))["running"]) for door in doors])


def used(door: Door, limit: str) -> int:
    return door.limiter.uses()[0].keys[0].limits[limit].used


async def test_64_clients_of_two_gateways_get_exactly_as_many_answers_as_the_minute_has(tmp_path: Path, server: Server) -> None:
    async with two_doors(tmp_path, server, limited(requests_per_minute=100)) as doors:
        assert await counted(clients(doors, 4)) == {200: 100, 429: 4 * CLIENTS - 100}
        assert sum([(await door.seen("replica-0"))["finished"] for door in doors]) == 100
        assert all(door.limiter.shared.stats().alone_requests == 0 for door in doors)  # type: ignore[union-attr]


async def test_64_clients_of_two_gateways_never_have_more_under_way_than_they_may(tmp_path: Path, server: Server) -> None:
    let_go = asyncio.Event()
    async with two_doors(tmp_path, server, limited(requests_in_flight_max=5), let_go=let_go) as doors:
        asking = clients(doors, 1, fake=HELD)
        await until(lambda: sum(task.done() for task in asking) == CLIENTS - 5)

        async def the_others_are_under_way() -> bool:
            return await running(doors) == 5

        await until(the_others_are_under_way)
        let_go.set()
        assert await counted(asking) == {200: 5, 429: CLIENTS - 5}
        await until(lambda: all(door.limiter.shared.stats().waiting_settlements == 0 for door in doors))  # type: ignore[union-attr]
        assert Counter(await asyncio.gather(*((ask_status(door)) for door in (*doors, *doors, doors[0])))) == {200: 5}


async def ask_status(door: Door) -> int:
    return (await ask(door))[0]


async def test_64_clients_of_two_gateways_cannot_overshoot_a_budget_of_tokens(tmp_path: Path, server: Server) -> None:
    each, let_go = PROMPT_TOKENS + 3, asyncio.Event()
    async with two_doors(tmp_path, server, limited(tokens_per_day=10 * each + 7), let_go=let_go) as doors:
        asking = clients(doors, 1, fake=HELD)
        await until(lambda: sum(task.done() for task in asking) == CLIENTS - 10)
        let_go.set()
        assert await counted(asking) == {200: 10, 429: CLIENTS - 10}
        await until(lambda: all(door.limiter.shared.stats().waiting_settlements == 0 for door in doors))  # type: ignore[union-attr]
        assert await ask_status(doors[0]) == 429
        assert used(doors[0], "tokens_per_day") == 10 * each


async def test_a_client_that_goes_from_one_gateway_to_the_other_is_told_of_both(tmp_path: Path, server: Server) -> None:
    async with two_doors(tmp_path, server, limited(requests_per_minute=3, requests_in_flight_max=1)) as doors:
        found = [await ask(doors[turn % 2]) for turn in range(4)]
        assert [status for status, _ in found] == [200, 200, 200, 429]
        assert [headers["x-ratelimit-remaining-requests"] for _, headers in found] == ["1", "1", "0", "0"]
        assert 0 < int(found[3][1]["retry-after"]) <= 61


async def test_a_server_that_dies_under_way_stops_nobody_and_is_told_later(tmp_path: Path, server: Server) -> None:
    let_go = asyncio.Event()
    async with two_doors(tmp_path, server, limited(tokens_per_day=100_000), let_go=let_go) as doors:
        asking = clients(doors, 3, fake=HELD)

        async def all_are_under_way() -> bool:
            return await running(doors) == CLIENTS

        await until(all_are_under_way)
        server.kill()
        await until(lambda: not any(door.limiter.shared.stats().up for door in doors))  # type: ignore[union-attr]
        began = time.monotonic()
        let_go.set()
        assert await counted(asking) == {200: 3 * CLIENTS}
        assert await ask_status(doors[0]) == 200
        assert time.monotonic() - began < WAIT_SECONDS_MAX
        charged = sum(use.charged_tokens for door in doors for use in door.limiter.uses())
        alone = sum(door.limiter.shared.stats().alone_requests for door in doors)  # type: ignore[union-attr]
        assert alone == 2 * CLIENTS + 1
        assert charged == (3 * CLIENTS + 1) * (PROMPT_TOKENS + 3)
        server.start()
        await until(lambda: all(door.limiter.shared.stats().waiting_settlements == 0 for door in doors))  # type: ignore[union-attr]
        assert await ask_status(doors[1]) == 200


async def test_a_client_that_leaves_while_the_server_is_asked_leaves_nothing_behind(tmp_path: Path, server: Server) -> None:
    async with two_doors(tmp_path, server, limited(requests_in_flight_max=1, tokens_per_day=1000)) as doors:
        body = COMPLETION | {"stream": True, "max_tokens": 100, "fake": {"token_delay": 0.05}}
        for door in doors:
            async with door.session.post(
                door.url + "/v1/completions", json=body, headers={"authorization": "Bearer a"}
            ) as answer:
                await answer.content.readuntil(b"\n\n")
                answer.close()
            await until(lambda door=door: len(door.limiter.book) == 0 and door.limiter.shared.stats().waiting_settlements == 0)
        assert await ask_status(doors[0]) == 200
