"""What bench.flood sends, and by which keys."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from bench.flood import TENANTS, Callers, Times, arrivals
from gateway.tenants.key_file import read_keys
from gateway.tenants.tenants import Tenants


def test_each_phase_has_the_same_moments_so_many_a_second() -> None:
    moments = list(arrivals(1000, 10, seed=1))
    assert moments == list(arrivals(1000, 10, seed=1)) != list(arrivals(1000, 10, seed=2))
    assert all(before < after for before, after in pairwise(moments))
    assert abs(len(moments) - 10_000) < 400


def test_the_flood_has_a_limit_and_the_others_one_that_they_do_not_reach(tmp_path: Path) -> None:
    callers = Callers.made(tmp_path / "keys.toml", 600)
    tenants = Tenants([], keys=read_keys(tmp_path / "keys.toml"))
    found = [tenants.authenticate(f"Bearer {token}".encode()) for token in (callers.flood, *callers.others)]
    assert len({tenant.salt for tenant in found}) == TENANTS + 1
    limits = [tenant.key.requests_per_minute for tenant in found if tenant.key]
    assert limits == [600] + [10**6] * TENANTS


def test_a_flood_without_a_limit_has_a_key_of_its_own_all_the_same(tmp_path: Path) -> None:
    callers = Callers.made(tmp_path / "keys.toml", None)
    found = Tenants([], keys=read_keys(tmp_path / "keys.toml")).authenticate(f"Bearer {callers.flood}".encode())
    assert (found.name, found.key) == ("flood", None)


def test_the_table_has_medians_and_tails_in_milliseconds() -> None:
    times = Times([0.01] * 98 + [0.05] * 2, [0.1] * 98 + [0.5] * 2)
    assert times.cells() == "100 | 10.0 | 50.0 | 100.0 | 500.0"
