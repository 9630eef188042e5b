"""How exact a block is, and which tenant's, in the highest bits of its state: the rest of a state counts, and is what a check
compares as well.

A caller who accepts loss has a salt of its own (`lossy_salt`), so its keys are other keys, and nothing that was computed on KV
that lost something can be taken for exact. The bits say it to who has only the key: what moves blocks to a disk.
A tenant's mark bounds its share of a tier, and nothing else: it is a short hash of the salt, which two tenants may have alike.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import xxhash

LOSSY = 1 << 63
"""The block's sequence may begin with KV that lost something, and the block itself may be kept with loss."""
CODED = 1 << 62
"""The block came out of a codec with loss: it is never put through one again."""
LATER = 1 << 61
"""The block is known not to be the first of its sequence: of that one some codecs keep the first tokens as they are."""
IN_CODE = 1 << 60
"""Of a tier's block: it lies there coded, as its memory's `coded` says, and has lost something once it is decoded."""
TENANT_SHIFT = 48
TENANT_MARK_MAX = (1 << 12) - 1
TENANT = TENANT_MARK_MAX << TENANT_SHIFT
"""The mark of the tenant whose salt the block's key has; 0 of callers without a salt, and where it is not known."""
QUALITY = LOSSY | CODED | LATER | IN_CODE
CARRIED = QUALITY | TENANT
"""What goes with a block from table to table, and into its frames."""
COUNT_MASK = np.uint64((1 << TENANT_SHIFT) - 1)
SALTS_REMEMBERED = 4096
_SUFFIX = "~lossy"


def lossy_salt(salt: str) -> str:
    """Return the salt of a caller's cache of KV that may have lost something, given that of its exact cache."""
    return salt + _SUFFIX


def exact_salt(salt: str) -> str:
    """Return the salt of a caller's exact cache, given that of either."""
    return salt.removesuffix(_SUFFIX)


def is_lossy_salt(salt: str | None) -> bool:
    """Whether a salt is that of a cache of KV that may have lost something."""
    return salt is not None and salt.endswith(_SUFFIX)


@lru_cache(SALTS_REMEMBERED)
def tenant_mark(salt: str | None) -> int:
    """Return the mark of the tenant with this salt, that of either cache: 1 to TENANT_MARK_MAX, 0 of none."""
    own = exact_salt(salt or "").encode("utf-8", "surrogatepass")
    return 1 + xxhash.xxh3_64_intdigest(b"peerkv-tenant" + own) % TENANT_MARK_MAX if own else 0


def marked(mark: int) -> int:
    """Return the bits of a state that say this mark."""
    return mark << TENANT_SHIFT


def mark_of(state: int) -> int:
    """Return the mark in a state, or in the bits of one."""
    return (state & TENANT) >> TENANT_SHIFT


def in_code(states: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Tell which blocks lie coded where these are their states (n,)."""
    found: npt.NDArray[np.bool_] = states & np.uint64(IN_CODE) != 0
    return found


def with_quality(states: npt.NDArray[np.uint64], quality: int | npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return states (n,) with the bits of `quality`, those of all or one each, in place of what they had."""
    return states & COUNT_MASK | np.asarray(quality, np.uint64)
