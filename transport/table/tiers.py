"""The names of tiers' tables: a tier of a replica is one more holder of its blocks, beside the replica itself."""

HOST_MEMORY = ".host-memory"


def host_memory_of(replica: str) -> str:
    """Return the name under which the host-memory tier of a replica holds blocks."""
    return replica + HOST_MEMORY


def is_tier(name: str) -> bool:
    """Tell whether a table of that name is a tier's and not an engine's."""
    return name.endswith(HOST_MEMORY)
