"""What the KV of an import comes over, between nodes too."""

from transport.node.names import node_of
from transport.table.tiers import way

NETWORK = "network"
"""From another node, by its agent and ours: whether by TCP or NIXL is what /kv/stats says of that node."""


def import_way(transport: str, source: str, importer: str = "") -> str:
    """Return what carries KV from `source` to `importer`, a replica that reads its peers by `transport`.

    Both are named as one node names them; "" is a replica of that node.
    """
    return NETWORK if node_of(source) != node_of(importer) else way(transport, source)
