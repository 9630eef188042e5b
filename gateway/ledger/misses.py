"""The reasons why less of a prompt came from a cache than could have."""

from enum import StrEnum

import msgspec


class MissReason(StrEnum):
    """One word for each request, in /metrics, /kv/stats, /kv/explain and the header x-peerkv-cache."""

    NONE = "none"  # everything that any replica held was delivered
    COLD = "cold"  # nobody ever computed this prompt's beginning
    LOAD = "load"  # its holder was busy, or importing would have taken longer than computing
    PROMISED = "promised"  # another request was computing it, and was not done when this one began
    STALE = "stale"  # the source was gone, or held less than it had when the request was planned
    CHECK_FAILED = "check_failed"  # the import was begun, and its blocks changed or could not be copied
    PARITY = "parity"  # our token ids are not, or not known to be, the engine's
    EVICTED = "evicted"  # it was asked for before, and its blocks were given to others, or their replica ended
    FLUSHED = "flushed"  # it was asked for before, and then caches were emptied on request
    OFF = "off"  # this request reads no cache, or its replica exchanges none
    RETRIED = "retried"  # the replica was lost or refused, and the request was tried elsewhere or failed
    LEFT = "left"  # the client left before the first token
    UNKNOWN = "unknown"  # no known reason explains it, or the engine left no record

    __hash__ = str.__hash__  # used as a key for each request; an enumeration's own hash is slow


class Miss(msgspec.Struct, frozen=True, gc=False):
    """`tokens` were computed although they had been computed before; for a parity miss, at most that many."""

    reason: MissReason
    tokens: int = 0
    words: str = ""


NO_MISS = Miss(MissReason.NONE)
COLD = Miss(MissReason.COLD, 0, "nobody held any of it")
