"""Names of holders as one node tells them from another: `node-b:replica-0` is what node-b calls replica-0.

A node's own holders have plain names there. So the same holder has one name on its own node and another everywhere else.
"""

import re
from functools import lru_cache

SEPARATOR = ":"
NODE_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
HOLDER_OF_A_NODE = re.compile(r"disk|vault|replica-\d+")
"""No node has such a name: nodes, and replicas and stores of one's own, are told of side by side, each by its name."""
HOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What a node may call a replica or a tier of its own: the name goes into paths, headers, metrics and pages of others."""


@lru_cache(4096)
def node_of(name: str) -> str:
    """Return the node in a holder's name, "" for one of this node."""
    return name.rpartition(SEPARATOR)[0]


def on_node(node: str, name: str) -> str:
    """Return how others call the holder that `node` calls `name`."""
    return f"{node}{SEPARATOR}{name}"


def as_seen_by(node: str, name: str, here: str) -> str:
    """Return how `node` calls the holder that `here` calls `name`; "" or `here` as `node` is this node itself."""
    if node in ("", here):
        return name
    owner, _, plain = name.rpartition(SEPARATOR)
    if owner == node:
        return plain
    return name if owner else on_node(here, name)


def as_told_by(node: str, name: str, here: str) -> str:
    """Return how `here` calls the holder that `node` calls `name`: the inverse of `as_seen_by`."""
    owner, _, plain = name.rpartition(SEPARATOR)
    if not owner:
        return on_node(node, name)
    return plain if owner == here else name
