"""What an import comes over, by the names of its two ends."""

import pytest

from transport.node.source_way import NETWORK, import_way


@pytest.mark.parametrize(
    ("transport", "source", "importer", "over"),
    [
        ("cuda_ipc", "replica-0", "", "cuda_ipc"),
        ("cuda_ipc", "replica-0.host-memory", "", "host_memory"),
        ("shared_memory", "replica-0", "replica-1", "shared_memory"),
        ("shared_memory", "node-b:replica-0", "", NETWORK),
        ("cuda_ipc", "node-b:replica-0", "replica-1", NETWORK),
        ("cuda_ipc", "node-b:replica-0.host-memory", "replica-1", NETWORK),
        ("cuda_ipc", "node-b:replica-0", "node-b:replica-1", "cuda_ipc"),
        ("cuda_ipc", "node-b:replica-0.host-memory", "node-b:replica-1", "host_memory"),
        ("cuda_ipc", "replica-0", "node-b:replica-1", NETWORK),
        ("cuda_ipc", "node-c:replica-0", "node-b:replica-1", NETWORK),
    ],
)
def test_the_network_carries_what_comes_from_another_node_and_nothing_else(transport, source, importer, over):
    assert import_way(transport, source, importer) == over
