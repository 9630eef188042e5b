"""Which KV memory a node's agent reads itself, and where it finds what it cannot read: in host memory."""

from collections.abc import Mapping

from transport.node.names import node_of
from transport.table.reader import TableReader
from transport.table.tiers import host_memory_of, tier_kind

READABLE = frozenset({"shared_memory"})
"""Ways to KV memory that an agent has itself; what lies on a GPU reaches other nodes by way of host memory."""


def readable(owner: TableReader) -> bool:
    """Tell whether an agent reads an owner's memory itself."""
    return all(memory.transport in READABLE for memory in owner.memories)


def stored_on_demand(owner: TableReader, tables: Mapping[str, TableReader]) -> bool:
    """Tell whether an engine, whose memory cannot be read, has host memory to store blocks in when others ask for them."""
    tier = tables.get(host_memory_of(owner.name))
    return tier is not None and keeps_for(tier, owner)


def keeps_for(tier: TableReader, owner: TableReader) -> bool:
    """Tell whether a table is host memory of this node, in which blocks under an owner's keys are that owner's blocks."""
    alike = (tier.fingerprint, tier.block_size, tier.hash_name) == (owner.fingerprint, owner.block_size, owner.hash_name)
    return tier_kind(tier.name) == "host_memory" and not node_of(tier.name) and tier.status == "ok" and alike
