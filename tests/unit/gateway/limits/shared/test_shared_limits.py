"""The server of shared limits as a gateway finds it: there, gone, slow, back, and behind TLS."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.frame_tiers.vault.address import VaultAddress
from engine.frame_tiers.vault.resp import pieces
from gateway.limits.account import Limit, Shortage
from gateway.limits.book import Reservation
from gateway.limits.limiter import Limiter
from gateway.limits.prices import Prices, Usage
from gateway.limits.shared import shared_limits
from gateway.limits.shared.shared_limits import PAUSE_SECONDS_MAX, PAUSE_SECONDS_MIN, SharedLimits
from gateway.tenants.keys import Key
from tests.unit.engine.frame_tiers.vault_servers import answering, tls_in_front, valkey
from tests.unit.gateway.limits.limited_keys import limited
from tests.unit.gateway.limits.shared.wires import Server, fresh_name
from tests.unit.gateway.running_door import until

WAIT_SECONDS = 0.3


@contextlib.asynccontextmanager
async def gateway(address: VaultAddress, *, connected: bool = True) -> AsyncIterator[Limiter]:
    """The limits of one gateway, at work."""
    shared = SharedLimits(address, wait_seconds_max=WAIT_SECONDS)
    limiter = Limiter(Prices(0.1, 1.0), reservation_seconds=3600, shared=shared)
    await shared.connect()
    assert shared.stats().up == connected
    running = asyncio.create_task(limiter.run())
    try:
        yield limiter
    finally:
        await limiter.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def let_in(limiter: Limiter, key: Key, tokens: int = 0) -> Reservation | Shortage:
    """What a request of the key is told, in this order, by this gateway's count and by all gateways'."""
    made = limiter.book.begin(key, time.time())
    if isinstance(made, Shortage):
        return made
    found = limiter.book.hold(made.id, tokens, time.time()) or await shared_of(limiter).reserve(made)
    if found is None:
        return made
    limiter.book.withdraw(made.id, time.time())
    return found


async def let_in_at_last(limiter: Limiter, key: Key, tokens: int) -> bool:
    return isinstance(await let_in(limiter, key, tokens), Reservation)


def shared_of(limiter: Limiter) -> SharedLimits:
    assert limiter.shared is not None
    return limiter.shared


async def test_what_one_gateway_lets_in_the_other_counts(valkey_address: VaultAddress) -> None:
    key = limited(fresh_name(), requests_per_minute=3, tokens_per_day=100)
    async with gateway(valkey_address) as one, gateway(valkey_address) as two:
        first = await let_in(one, key, 60)
        assert isinstance(first, Reservation)
        short = await let_in(two, key, 50)
        assert isinstance(short, Shortage)
        assert (short.limit, short.used, short.asked, short.spent) == (Limit.TOKENS_PER_DAY, 60, 50, False)
        one.settle(first, Usage(10))  # is told to the server soon
        await until(lambda: let_in_at_last(two, key, 50))
        lines = dict(line.split(": ") for line in two.header_lines(key).decode().splitlines())
        assert (lines["x-ratelimit-remaining-requests"], lines["x-ratelimit-remaining-tokens"]) == ("1", "40")
        assert isinstance(await let_in(one, key, 0), Reservation)
        short = await let_in(two, key, 0)
        assert isinstance(short, Shortage)
        assert (short.limit, short.used) == (Limit.REQUESTS_PER_MINUTE, 3)
        assert short.seconds is not None
        assert 55 < short.seconds <= 61
        lines = dict(line.split(": ") for line in two.header_lines(key).decode().splitlines())
        assert lines["x-ratelimit-remaining-requests"] == "0"


async def test_a_refusal_stands_for_a_moment_without_asking_again(valkey_address: VaultAddress) -> None:
    key = limited(fresh_name(), requests_per_minute=1)
    async with gateway(valkey_address) as one, gateway(valkey_address) as two:
        assert isinstance(await let_in(one, key), Reservation)
        assert shared_of(two).refusal(key) is None
        refused = await let_in(two, key)
        again = shared_of(two).refusal(key)
        assert isinstance(refused, Shortage)
        assert again is not None
        assert again._replace(seconds=0) == refused._replace(seconds=0)


async def test_without_a_server_each_gateway_counts_alone_at_once_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    key = limited(fresh_name(), requests_per_minute=1)
    async with gateway(VaultAddress("127.0.0.1", 1, password="a-secret-word"), connected=False) as one:
        began = time.monotonic()
        assert isinstance(await let_in(one, key), Reservation)
        assert time.monotonic() - began < WAIT_SECONDS
        assert isinstance(await let_in(one, key), Shortage)
        stats = shared_of(one).stats()
        assert (stats.up, stats.alone_requests) == (0, 1)
        [warning] = shared_of(one).warnings()
    assert "limits are counted by this gateway alone: valkey://127.0.0.1:1/0: no connection" in warning
    assert warning.split(" (")[0] in caplog.text
    assert "a-secret-word" not in caplog.text + warning


async def test_a_server_that_may_forget_is_told_of(valkey_address: VaultAddress, caplog: pytest.LogCaptureFixture) -> None:
    async with gateway(valkey_address) as one:  # as `peerkv vault` has it
        [warning] = shared_of(one).warnings()
        assert "may forget what was used of limits" in warning
        assert warning in caplog.text


async def test_who_is_not_let_in_is_told_why(valkey_address: VaultAddress) -> None:
    wrong = VaultAddress(valkey_address.host, valkey_address.port, password="wrong")
    async with gateway(wrong, connected=False) as one:
        [warning] = shared_of(one).warnings()
    assert "WRONGPASS" in warning


async def test_a_server_that_never_answers_costs_one_wait_and_no_more() -> None:
    key = limited(fresh_name(), requests_per_minute=50)
    silent = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"SCRIPT")
        writer.write(b"$2\r\nab\r\n")
        await reader.readuntil(b"memory\r\n")
        writer.write(b"-NOPERM\r\n")
        await silent.wait()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with gateway(VaultAddress("127.0.0.1", port)) as one:
        began = time.monotonic()
        found = await asyncio.gather(*(let_in(one, key) for _ in range(20)))
        took = time.monotonic() - began
        assert all(isinstance(each, Reservation) and each.shared == "here" for each in found)
        assert WAIT_SECONDS <= took < WAIT_SECONDS + 1
        assert shared_of(one).stats().alone_requests == 20
        server.close()
        silent.set()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "an answer that is none"),
        (b"-LOADING\r\n", "LOADING"),
        (b":1\r\n:2\r\n", "the server closed the connection"),
    ],
)
async def test_a_server_that_is_none_is_not_used(answer: bytes, why: str) -> None:
    with answering(answer) as address:
        async with gateway(address, connected=False) as one:
            made = await let_in(one, limited(fresh_name(), requests_per_minute=5))
            assert isinstance(made, Reservation)
            assert made.shared == "here"
            failures = shared_of(one).stats().failures
            await until(lambda: shared_of(one).stats().failures > failures)  # of another try
            [warning] = shared_of(one).warnings()
            assert why in warning


async def test_what_was_counted_alone_is_told_when_the_server_is_back(tmp_path: Path) -> None:
    key = limited("k", requests_per_minute=9, tokens_per_day=1000)
    with valkey(tmp_path) as server:
        async with gateway(server.address) as one:
            before = await let_in(one, key, 30)
            assert isinstance(before, Reservation)
            server.kill()
            await until(lambda: not shared_of(one).stats().up)
            meanwhile = await let_in(one, key, 20)
            assert isinstance(meanwhile, Reservation)
            one.settle(before, Usage(25))
            one.settle(meanwhile, Usage(15))
            running = await let_in(one, key, 100)
            assert isinstance(running, Reservation)
            assert shared_of(one).stats().waiting_settlements == 1
            server.start()  # and remembers nothing
            await until(lambda: shared_of(one).stats().up == 1)
            await until(lambda: shared_of(one).stats().waiting_settlements == 0)
            await until(lambda: running.shared == "there")
            async with gateway(server.address) as two:
                short = await let_in(two, key, 900)
                assert isinstance(short, Shortage)
                assert (short.limit, short.used) == (Limit.TOKENS_PER_DAY, 25 + 15 + 100)
            one.settle(running, Usage(0))


async def test_a_script_that_was_flushed_is_loaded_again(tmp_path: Path) -> None:
    key = limited("k", requests_per_minute=9)
    with valkey(tmp_path) as server:
        async with gateway(server.address) as one:
            assert isinstance(await let_in(one, key), Reservation)
            raw = Server(server.address)
            raw.run(b"*2\r\n$6\r\nSCRIPT\r\n$5\r\nFLUSH\r\n")
            raw.close()
            alone = await let_in(one, key)
            assert isinstance(alone, Reservation)
            assert alone.shared == "here"
            await until(lambda: shared_of(one).stats().up == 1)
            again = await let_in(one, key)
            assert isinstance(again, Reservation)
            assert again.shared == "there"


async def test_a_key_that_somebody_elses_value_has_at_the_server_is_told_of_once_and_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(shared_limits, "HOLD_SECONDS", 0.01)
    x, y = limited("x", requests_per_minute=9), limited("y", requests_per_minute=9)
    with valkey(tmp_path) as server:
        async with gateway(server.address) as one:
            raw = Server(server.address)
            raw.run(b"".join(pieces([b"SET", b"peerkv:limits:1:{x}", b"1"])))
            for _ in range(2):
                found = await asyncio.gather(let_in(one, x), let_in(one, y))
                assert [each.shared for each in found if isinstance(each, Reservation)] == ["here", "there"]
            failures = shared_of(one).stats().failures
            await until(lambda: shared_of(one).stats().failures > failures)  # of saying that they are under way
            assert isinstance(found[0], Reservation)
            one.settle(found[0], Usage(1))
            await until(lambda: shared_of(one).stats().lost_settlements == 1)
            assert shared_of(one).stats().up == 1
            assert [record.levelname for record in caplog.records if "'x'" in record.message] == ["ERROR"]
            assert "WRONGTYPE" in caplog.text
            raw.run(b"".join(pieces([b"DEL", b"peerkv:limits:1:{x}"])))
            raw.close()
            again = await let_in(one, x)
            assert isinstance(again, Reservation)
            assert again.shared == "there"
            assert [record.levelname for record in caplog.records if "'x'" in record.message] == ["ERROR", "INFO"]


async def test_the_pause_before_a_new_connection_is_short_again_after_any_answer(valkey_address: VaultAddress) -> None:
    key = limited(fresh_name(), requests_per_minute=1)
    async with gateway(valkey_address) as one, gateway(valkey_address) as two:
        assert isinstance(await let_in(one, key), Reservation)
        shared_of(two)._pause = PAUSE_SECONDS_MAX
        assert isinstance(await let_in(two, key), Shortage)
        assert shared_of(two)._pause == PAUSE_SECONDS_MIN


async def test_the_pause_before_a_new_connection_is_short_again_after_one_that_lasted(
    valkey_address: VaultAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_limits, "HOLD_SECONDS", 0.01)
    async with gateway(valkey_address) as one:
        shared_of(one)._pause = PAUSE_SECONDS_MAX
        await until(lambda: shared_of(one)._pause == PAUSE_SECONDS_MIN)


async def test_a_gateway_that_dies_leaves_no_reservation(valkey_address: VaultAddress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.limits.shared.commands._LEASE", b"300")
    key = limited(fresh_name(), requests_in_flight_max=1)
    async with gateway(valkey_address) as two:
        one = SharedLimits(valkey_address, wait_seconds_max=WAIT_SECONDS)
        await one.connect()
        assert await one.reserve(Reservation(1, key, 0, 0, 0.0)) is None
        assert isinstance(await let_in(two, key), Shortage)

        async def free() -> bool:
            return isinstance(await let_in(two, key), Reservation)

        deadline = time.monotonic() + 10
        while not await free():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


async def test_a_user_with_no_more_rights_than_the_documents_name_is_enough(valkey_address: VaultAddress) -> None:
    text = (Path(__file__).parents[5] / "docs" / "security.md").read_text("utf-8")
    rights = text[text.index("ACL SETUSER ") :].partition("`")[0].replace("PASSWORD", "a-password-of-tests").split()
    raw = Server(valkey_address)
    assert raw.run(b"".join(pieces([word.encode() for word in rights]))) == b"OK"
    raw.close()
    user = VaultAddress(valkey_address.host, valkey_address.port, user=rights[2], password="a-password-of-tests")
    async with gateway(user) as one:
        made = await let_in(one, limited(fresh_name(), requests_per_minute=1, tokens_per_day=9), 5)
        assert isinstance(made, Reservation)
        assert made.shared == "there"
        one.settle(made, Usage(3))
        await until(lambda: shared_of(one).stats().waiting_settlements == 0)
        assert shared_of(one).stats().failures == 0


async def test_it_speaks_tls_and_checks_whom_it_speaks_to(valkey_address: VaultAddress, tmp_path: Path) -> None:
    with tls_in_front(valkey_address, tmp_path) as address:
        async with gateway(address) as one:
            assert isinstance(await let_in(one, limited(fresh_name(), requests_per_minute=1)), Reservation)
        stranger = VaultAddress(address.host, address.port, tls=True, password=address.password)
        async with gateway(stranger, connected=False) as one:
            [warning] = shared_of(one).warnings()
            assert "certificate" in warning.lower()
