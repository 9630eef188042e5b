"""The names of tiers, and over what their blocks come."""

import pytest

from transport.table.tiers import host_memory_of, is_tier, way

TIER = host_memory_of("replica-0")


def test_a_tiers_name_tells_it_from_an_engines():
    assert is_tier(TIER)
    assert not is_tier("replica-0")


@pytest.mark.parametrize(
    ("transport", "source", "over"),
    [
        ("cuda_ipc", TIER, "host_memory"),
        ("cuda_ipc", "replica-0", "cuda_ipc"),
        ("shared_memory", TIER, "shared_memory"),
        ("shared_memory", "replica-0", "shared_memory"),
    ],
)
def test_host_memory_reaches_a_gpu_by_another_way_than_a_peers_memory(transport, source, over):
    assert way(transport, source) == over
