"""Why a prompt was not served from a cache as far as it could have been. A pure function of what was planned and delivered."""

from enum import StrEnum

import msgspec

from transport.table.deliveries import DeliveryReason


class MissReason(StrEnum):
    """One word for each request, in /metrics, /kv/stats, /kv/explain and the header x-peerkv-cache."""

    NONE = "none"  # delivered was all that anybody had
    COLD = "cold"  # nobody ever computed this prompt's beginning
    LOAD = "load"  # its holder was busy, or importing would have taken longer than computing
    PROMISED = "promised"  # another request was computing it, and was not done when this one began
    STALE = "stale"  # the source was gone, or held less than it had when the request was planned
    CHECK_FAILED = "check_failed"  # the import was begun, and its blocks changed or could not be copied
    PARITY = "parity"  # our token ids are not, or not known to be, the engine's
    EVICTED = "evicted"  # it had been computed, and its blocks were given to others, or their replica ended
    TENANT_BOUNDARY = "tenant_boundary"  # another tenant's blocks hold it, and tenants share nothing
    OFF = "off"  # this request reads no cache, or its replica exchanges none
    RETRIED = "retried"  # the replica was lost or refused, and the request was tried elsewhere or failed
    LEFT = "left"  # the client left before the first token
    UNKNOWN = "unknown"  # nothing that we know explains it, or no record came

    __hash__ = str.__hash__  # counted by for each request, and an enumeration's own hash is Python code


_READS_NO_CACHE = DeliveryReason.READS_NO_CACHE
_STALE = frozenset({DeliveryReason.SOURCE_GONE, DeliveryReason.SOURCE_HELD_LESS})
_CHECK_FAILED = frozenset({DeliveryReason.CHECK_FAILED, DeliveryReason.COPY_FAILED, DeliveryReason.SOURCE_UNREADABLE})


class Case(msgspec.Struct, frozen=True, gc=False):
    """All that a loss is judged by; counts are prompt tokens.

    `best_available` is the longest prefix that any replica held or was computing when the request was planned, `best_held` the
    longest that any held; `formerly` the longest that was
    computed for this tenant before, `elsewhere` the longest that other tenants' blocks hold now: 0 when not known or not asked.
    `looked_up` is False where the token ids were not known; `why` is what the engine says of its import.
    """

    prompt_tokens: int
    block_size: int
    predicted_local: int = 0
    predicted_peer: int = 0
    best_available: int = 0
    best_held: int = 0
    local: int = 0
    peer: int = 0
    looked_up: bool = True
    parity_exact: bool = True
    reads_cache: bool = True
    why: DeliveryReason = DeliveryReason.NONE
    formerly: int = 0
    elsewhere: int = 0

    @property
    def delivered(self) -> int:
        return self.local + self.peer

    @property
    def useful(self) -> int:
        """The most that could be delivered."""
        return useful_tokens(self.prompt_tokens, self.block_size)


def useful_tokens(prompt_tokens: int, block_size: int) -> int:
    """Tokens in full blocks; the last token of a prompt is always computed."""
    return (prompt_tokens - 1) // block_size * block_size if prompt_tokens > 0 and block_size > 0 else 0


class Miss(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """`tokens` were computed though they had been computed before; of a parity loss that is the most it can be."""

    reason: MissReason
    tokens: int = 0
    words: str = ""


NO_MISS = Miss(MissReason.NONE)
COLD = Miss(MissReason.COLD, 0, "nobody held any of it")


def judge(case: Case) -> Miss:
    """Tell why less was delivered than could have been, the nearest cause first."""
    if not case.reads_cache or case.why is _READS_NO_CACHE:
        return Miss(MissReason.OFF, 0, "the engine computes this request's prompt whole")
    delivered = case.local + case.peer
    if delivered >= useful_tokens(case.prompt_tokens, case.block_size):
        return NO_MISS
    if not case.looked_up:
        return _unseen(case)
    if delivered < case.best_available:
        return _short(case)
    if case.formerly > delivered or case.elsewhere > delivered:
        return _held_before(case)
    return NO_MISS if delivered else COLD


def _unseen(case: Case) -> Miss:
    missing = case.useful - case.delivered
    if not case.parity_exact:
        return Miss(MissReason.PARITY, missing, "its token ids were not known to be the engine's, so it was steered blindly")
    return Miss(MissReason.UNKNOWN, 0, "its token ids were not known, so it was steered blindly")


def _short(case: Case) -> Miss:
    """Somebody held more than was delivered."""
    lost = case.best_available - case.delivered
    if case.why in _CHECK_FAILED:
        return Miss(MissReason.CHECK_FAILED, lost, "blocks changed, or could not be read, while they were copied")
    if case.why in _STALE:
        return Miss(MissReason.STALE, lost, "the source held less when the engine looked than when the request was planned")
    if case.why is DeliveryReason.NOT_EXCHANGING:
        return Miss(MissReason.OFF, lost, "the replica does not exchange with the source")
    if case.why is DeliveryReason.ALLOCATION:
        return Miss(MissReason.LOAD, lost, "the replica had no room for the import")
    if case.delivered >= case.predicted_local + case.predicted_peer:
        return Miss(
            MissReason.LOAD, lost, "waiting for, or importing from, the replica that holds more would have taken longer"
        )
    if case.delivered >= case.best_held:
        return Miss(MissReason.PROMISED, lost, "another request was computing it, and was not done when this one began")
    if not case.parity_exact:
        return Miss(MissReason.PARITY, lost, "its token ids were a guess, and the engine's differ")
    if case.local < case.predicted_local:
        return Miss(MissReason.EVICTED, lost, "the replica's blocks were given away between the plan and the first step")
    return Miss(MissReason.UNKNOWN, lost, "the engine does not say why it imported less")


def _held_before(case: Case) -> Miss:
    """All that anybody held when the request was planned was delivered."""
    delivered = case.delivered
    if case.formerly > delivered and case.formerly >= case.elsewhere:
        return Miss(MissReason.EVICTED, case.formerly - delivered, "no replica holds any more what was computed before")
    return Miss(MissReason.TENANT_BOUNDARY, case.elsewhere - delivered, "blocks of another tenant hold it")
