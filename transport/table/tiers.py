"""The names of tiers' tables: a tier is one more holder of blocks, beside the replicas.

Each replica has a table of its own in host memory. What comes up from a disk or a vault lies in a table of the node's.
"""

from typing import Literal

TierKind = Literal["host_memory", "disk", "vault"]
HOST_MEMORY = ".host-memory"
FROM_HOST = "host_memory"
_STAGED: dict[str, TierKind] = {"disk": "disk", "vault": "vault"}


def host_memory_of(replica: str) -> str:
    """Return the name under which the host-memory tier of a replica holds blocks."""
    return replica + HOST_MEMORY


def staged_from(store: str, number: int = 0) -> str:
    """Return the name under which blocks that came up from `store` are held; `number` tells models of one node apart."""
    return f"{store}.{number + 1}" if number else store


def tier_kind(name: str) -> TierKind | None:
    """Return which kind of tier has a table of that name, None for an engine's."""
    if name.endswith(HOST_MEMORY):
        return "host_memory"
    store, _, number = name.partition(".")
    return _STAGED.get(store) if not number or number.isdecimal() else None


def is_tier(name: str) -> bool:
    """Tell whether a table of that name is a tier's and not an engine's."""
    return tier_kind(name) is not None


def way(transport: str, source: str) -> str:
    """Return what carries KV from `source` to a replica that reads its peers by `transport`: a tier's, to a GPU, comes by PCIe.

    On the CPU both are read out of memory alike.
    """
    return FROM_HOST if transport == "cuda_ipc" and is_tier(source) else transport
