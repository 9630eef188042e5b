"""One holder has one name on its own node and another everywhere else; both ways round they fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.node.settings import check_name
from transport.node.messages import NodeError
from transport.node.names import as_seen_by, as_told_by, node_of, on_node

nodes = st.sampled_from(["node-a", "node-b", "node-c"])
plain = st.sampled_from(["replica-0", "replica-1.host-memory"])


@given(nodes, nodes, nodes, plain)
def test_a_name_that_is_told_on_and_back_is_the_same(owner: str, here: str, there: str, name: str) -> None:
    ours = name if owner == here else on_node(owner, name)
    theirs = as_seen_by(there, ours, here)
    assert theirs == (name if owner == there else on_node(owner, name))
    if there != here:
        assert as_told_by(there, theirs, here) == ours


def test_names_without_a_node_are_this_nodes() -> None:
    assert node_of("replica-0.host-memory") == ""
    assert node_of("node-b:replica-0") == "node-b"
    assert as_seen_by("", "replica-0", "") == "replica-0"
    for good in ("a", "node-1", "x" * 32, "disk-1", "replica"):
        check_name(good)


@pytest.mark.parametrize("name", ["disk", "vault", "replica-0", "replica-17"])
def test_no_node_is_called_as_a_store_or_a_replica_which_it_would_hide_where_both_are_told(name: str) -> None:
    with pytest.raises(NodeError, match="call the node otherwise"):
        check_name(name)
