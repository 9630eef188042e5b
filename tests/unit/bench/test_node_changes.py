"""How old what an index knows of another node is, measured with two real agents."""

from bench.node_changes import measure


def test_all_that_is_published_on_a_node_is_seen_in_the_index_of_another() -> None:
    found = measure(tables=2, changes=1000, seconds=1.0)
    assert found["never_seen"] == 0
    assert found["other_node_ms"]["p50"] > found["own_ms"]["p50"] >= 0
    assert found["other_node_ms"]["max"] < 10_000
