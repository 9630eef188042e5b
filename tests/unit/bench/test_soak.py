"""What bench.soak sends and by which keys, and what it counts as lost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.soak import CONNECTIONS_PER_TIGHT_KEY, TENANTS, TIGHT_LIMITS, Callers, Tally, asked
from gateway.continuation.terms import terms_of
from gateway.tenants.key_file import read_keys
from gateway.tenants.tenants import Tenants
from tests.fake_engine import asked_of


@pytest.mark.parametrize("fake", [{}, {"token_delay": 0.02}])
def test_its_streams_can_be_continued(fake: dict[str, Any]) -> None:
    body = asked("prompt", 24, **fake)
    assert terms_of("completions", body, {}) is not None
    assert asked_of(body) == fake


def test_one_key_has_limits_that_are_reached_and_the_others_some_that_are_not(tmp_path: Path) -> None:
    callers = Callers.made(tmp_path / "keys.toml")
    tenants = Tenants([], callers.admin, keys=read_keys(tmp_path / "keys.toml"))
    keys = [tenants.authenticate(f"Bearer {callers.token(number)}".encode()).key for number in range(80)]
    assert len({key.name for key in keys if key}) == 1 + TENANTS
    tight = [
        number for number, key in enumerate(keys) if key and key.requests_per_minute == TIGHT_LIMITS["requests_per_minute"]
    ]
    assert tight == [0, CONNECTIONS_PER_TIGHT_KEY]
    assert all(key is not None and key.tokens_in_flight_max for key in keys)


def test_what_went_down_with_its_replica_is_lost_before_and_after_the_first_byte() -> None:
    tally = Tally(Counter({"answer": 97, "error event replica_lost": 2, "error 502 replica_lost": 1, "wrong: no end": 0}))
    assert tally.lost_share() == pytest.approx(0.03)
    assert Tally().lost_share() == 0
