"""The settings of the tiers: how long blocks stay has an end that can be counted, or none at all."""

import pytest

from gateway.errors import SettingsError
from gateway.settings import load

TEN_YEARS = 315360000


@pytest.mark.parametrize("name", ["host_memory_ttl_seconds", "disk_ttl_seconds", "vault_ttl_seconds"])
def test_a_time_that_blocks_stay_is_at_most_ten_years(name: str) -> None:
    for given in ("inf", float("inf"), "1e300", "nan", TEN_YEARS + 1, -1):
        with pytest.raises(SettingsError, match=f"{name}: must be a number from 0 to {TEN_YEARS}, not"):
            load({name: given})
    assert [getattr(load({name: given}), name) for given in (0, TEN_YEARS)] == [0, TEN_YEARS]
