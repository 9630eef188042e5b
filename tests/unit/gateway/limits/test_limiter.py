"""Limits at work: words and headers of OpenAI's kind, figures with bounded names, and the file."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from engine.frame_tiers.vault.address import VaultAddress
from gateway.errors import ApiError
from gateway.limits import limiter as at_work
from gateway.limits.book import Reservation
from gateway.limits.limiter import OTHERS, Limiter
from gateway.limits.prices import Prices, Usage
from gateway.limits.shared.shared_limits import SharedLimits
from gateway.limits.state_file import StateFile
from gateway.tenants.keys import Key, Keys
from tests.unit.gateway.limits.limited_keys import limited
from tests.unit.gateway.running_door import until

NOW = 1_800_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def made(*keys: Key, file: StateFile | None = None, clock: Clock | None = None) -> Limiter:
    content = Keys(salt_secret="ab" * 32, keys=keys)
    return Limiter(Prices(0.1, 1.0), reservation_seconds=60, keys=lambda: content, file=file, clock=clock or Clock())


def test_the_headers_tell_of_the_limits_with_the_least_left() -> None:
    key = limited(requests_per_minute=10, tokens_per_minute=1000, tokens_per_day=500)
    limiter = made(key)
    limiter.hold(limiter.begin(key), Usage(100, 0, 20))
    lines = dict(line.split(": ") for line in limiter.header_lines(key).decode().splitlines())
    assert lines == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "9",
        "x-ratelimit-reset-requests": "1m1s",
        "x-ratelimit-limit-tokens": "500",
        "x-ratelimit-remaining-tokens": "380",
        "x-ratelimit-reset-tokens": "16h0m0s",
    }
    assert limiter.header_lines(limited("other", models=("m",))) == b""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0ms"), (0.0204, "20ms"), (1, "1s"), (6.2, "7s"), (360, "6m0s"), (86399, "23h59m59s")]
)
def test_durations_are_written_as_openai_does(seconds: float, words: str) -> None:
    assert at_work._duration(seconds).decode() == words


def refused(limiter: Limiter, key: Key, usage: Usage | None = None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        limiter.hold(limiter.begin(key), usage or Usage())
    return caught.value


def test_a_rate_limit_says_when_to_try_again() -> None:
    key = limited("alice", requests_per_minute=1)
    limiter = made(key)
    limiter.settle(limiter.begin(key), Usage())
    error = refused(limiter, key)
    assert (error.status, error.type, error.code) == (429, "requests", "rate_limit_exceeded")
    assert error.headers == {"retry-after": "61"}
    assert "requests per min (RPM): Limit 1, Used 1, Requested 1. Please try again in 61s." in error.message


def test_what_can_never_fit_is_not_to_be_tried_again_and_counts_for_nothing() -> None:
    key = limited(tokens_per_minute=100, requests_per_minute=1)
    limiter = made(key)
    error = refused(limiter, key, Usage(90, 0, 20))
    assert (error.type, error.code, error.headers) == ("tokens", "rate_limit_exceeded", {"x-should-retry": "false"})
    assert "Request too large" in error.message
    assert "names no" not in error.message
    limiter.begin(key)


@pytest.mark.parametrize("limit", ["tokens_per_minute", "tokens_per_day"])
def test_who_names_no_max_tokens_is_told_what_was_reserved(limit: str) -> None:
    key = limited(**{limit: 1000})
    limiter = made(key)
    with pytest.raises(ApiError) as caught:
        limiter.hold(limiter.begin(key), Usage(90, 0, 4096), 4096)
    assert "It names no 'max_tokens', so 4096 were reserved for each answer: naming fewer helps." in caught.value.message


def test_a_budget_that_is_used_up_is_a_quota() -> None:
    key = limited(tokens_per_day=100)
    limiter = made(key)
    reservation = limiter.begin(key)
    limiter.hold(reservation, Usage(100))
    limiter.settle(reservation, Usage(100))
    error = refused(limiter, key)
    assert (error.status, error.type, error.code) == (429, "insufficient_quota", "insufficient_quota")
    assert error.headers == {"x-should-retry": "false", "retry-after": "57600"}
    assert "It begins anew at 00:00 UTC" in error.message


def test_what_no_budget_of_a_day_would_do_for_is_too_large_and_no_other_day_is_named() -> None:
    key = limited(tokens_per_day=100)
    error = refused(made(key), key, Usage(101))
    assert (error.status, error.code, error.headers) == (429, "insufficient_quota", {"x-should-retry": "false"})
    assert "Request too large" in error.message
    assert "Send a shorter prompt" in error.message


def test_figures_are_by_tenant_and_by_key() -> None:
    key = limited("k", requests_per_minute=1, tokens_per_day=1000)
    limiter = made(key, limited("free", token="2"), limited("gone", token="3", n_max=1, revoked="2026-01-01"))
    limiter.settle(reservation := limiter.begin(key), Usage(10, 30, 5))
    limiter.settle(reservation, Usage(10, 30, 5))
    refused(limiter, key)
    limiter.count_refusal(key, "model")
    [use] = limiter.uses()
    assert (use.tenant, use.requests, use.charged_tokens) == ("t", 1, 18)
    assert (use.uncached_tokens, use.cached_tokens, use.generated_tokens) == (10, 30, 5)
    assert {name: count for name, count in use.refused.items() if count} == {"requests_per_minute": 1, "model": 1}
    [shown] = use.keys
    assert shown.key == "k"
    assert {name: (each.used, each.limit) for name, each in shown.limits.items()} == {
        "requests_per_minute": (1, 1),
        "tokens_per_day": (18, 1000),
    }


def test_so_many_tenants_are_shown_apart_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_work, "TENANTS_SHOWN_MAX", 2)
    keys = [limited(f"k{number}", tenant=f"t{number}", n_max=1) for number in range(5)]
    limiter = made(*keys)
    for key in keys:
        limiter.begin(key)
    uses = limiter.uses()
    assert [(use.tenant, use.requests) for use in uses] == [("t0", 1), ("t1", 1), (OTHERS, 3)]
    assert sum(len(use.keys) for use in uses) == 5
    assert len(made(*keys).uses()) == 3


async def test_what_was_used_up_survives_a_restart_and_reservations_do_not(tmp_path: Path) -> None:
    key, clock = limited(tokens_per_day=100, requests_in_flight_max=1), Clock()
    before = made(key, file=StateFile(tmp_path / "there" / "limits.json"), clock=clock)
    reservation = before.begin(key)
    before.settle(reservation, Usage(70))
    before.begin(key)
    await before.close()
    clock.now += 5
    after = made(key, file=StateFile(tmp_path / "there" / "limits.json"), clock=clock)
    [use] = after.uses()
    assert use.keys[0].requests_in_flight == 0
    assert use.keys[0].limits["tokens_per_day"].used == 70
    assert refused(after, key, Usage(31)).code == "insufficient_quota"
    await after.close()


async def test_what_goes_wrong_at_the_server_of_limits_does_not_end_what_is_counted_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(at_work, "WRITE_SECONDS", 0.01)
    monkeypatch.setattr(at_work, "DEFECT_SECONDS", 0.01)

    class Broken(SharedLimits):
        runs = 0

        async def run(self, under_way: Callable[[], Iterable[Reservation]]) -> None:
            self.runs += 1
            if self.runs == 1:
                raise ZeroDivisionError
            await asyncio.Event().wait()

    shared, path, key = Broken(VaultAddress("127.0.0.1", 1), wait_seconds_max=1.0), tmp_path / "limits.json", limited(n_max=1)
    limiter = Limiter(Prices(0.1, 1.0), reservation_seconds=60, file=StateFile(path), shared=shared)
    running = asyncio.create_task(limiter.run())
    await until(lambda: shared.runs == 2)
    limiter.begin(key)
    await until(path.exists)
    assert not running.done()
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert "the server of limits failed" in record.message
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await limiter.close()


def test_a_file_that_cannot_be_read_begins_anew_and_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "limits.json"
    path.write_text("{half a fi")
    file = StateFile(path)
    assert file.open() == {}
    assert "begins anew" in caplog.text
    file.write(file.encode({}))
    file.close()
    again = StateFile(path)
    assert again.open() == {}
    again.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["limits.json", "limits.json.lock"]


def test_a_file_is_one_gateways_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = StateFile(tmp_path / "limits.json"), StateFile(tmp_path / "limits.json")
    first.open()
    assert second.open() == {}
    assert not second.is_ours
    assert "another gateway has it" in caplog.text
    second.write(b"nothing")
    assert not (tmp_path / "limits.json").exists()
    first.close()
    first.write(b"late")
    assert not (tmp_path / "limits.json").exists()
    second.open()
    assert second.is_ours
    second.close()


def test_what_cannot_be_written_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    file = StateFile(tmp_path / "limits.json")
    file.open()
    (tmp_path / "limits.json").mkdir()
    file.write(b"{}")
    file.write(b"{}")
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["limits.json", "limits.json.lock"]
    file.close()
