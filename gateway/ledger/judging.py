"""Judges an attempt: why less was delivered than could have been. It depends on what was planned and delivered alone."""

from gateway.ledger.attempts import Attempt
from gateway.ledger.misses import COLD, NO_MISS, Miss, MissReason
from transport.table.deliveries import Delivery, DeliveryReason

_NOTHING = Delivery()
_READS_NO_CACHE = DeliveryReason.READS_NO_CACHE
_STALE = frozenset({DeliveryReason.SOURCE_GONE, DeliveryReason.SOURCE_HELD_LESS})
_CHECK_FAILED = frozenset({DeliveryReason.CHECK_FAILED, DeliveryReason.COPY_FAILED, DeliveryReason.SOURCE_UNREADABLE})


def useful_tokens(prompt_tokens: int, block_size: int) -> int:
    """Tokens in full blocks; the last token of a prompt is always computed."""
    return (prompt_tokens - 1) // block_size * block_size if prompt_tokens > 0 and block_size > 0 else 0


def judge(attempt: Attempt) -> Miss:
    """Return why less was delivered than could have been; the most direct cause counts.

    Predictions count in whole blocks, as engines deliver them. It is worked out again when another delivery has come.
    """
    if attempt.judged is None:
        attempt.judged = _judged(attempt)
    return attempt.judged


def _judged(attempt: Attempt) -> Miss:
    got = attempt.steered
    tokens = attempt.prompt_tokens if got is None else got.prompt_tokens
    got = got or _NOTHING
    if not attempt.reads_cache or got.why is _READS_NO_CACHE:
        return Miss(MissReason.OFF, 0, "the engine computes this request's prompt whole")
    size, delivered = attempt.block_size, got.local_tokens + got.peer_tokens
    useful = useful_tokens(tokens, size)
    if delivered >= useful:
        return NO_MISS
    if not attempt.looked_up:
        return _unseen(attempt, useful - delivered)
    best = attempt.decision.best_available_tokens // size * size
    if delivered < best:
        return _short(attempt, got, best - delivered)
    formerly = min(attempt.formerly_tokens, useful)
    if formerly > delivered and attempt.flushed:
        return Miss(MissReason.FLUSHED, formerly - delivered, "caches were flushed since it was last asked for")
    if formerly > delivered:
        return Miss(MissReason.EVICTED, formerly - delivered, "no replica holds any more what was asked for before")
    return NO_MISS if delivered else COLD


def _unseen(attempt: Attempt, missing: int) -> Miss:
    if not attempt.parity_exact:
        return Miss(MissReason.PARITY, missing, "its token ids were not known to be the engine's, so it was steered blindly")
    return Miss(MissReason.UNKNOWN, 0, "its token ids were not known, so it was steered blindly")


def _short(attempt: Attempt, got: Delivery, lost: int) -> Miss:
    """Somebody held more than was delivered."""
    size, expected, delivered = attempt.block_size, attempt.decision.expected, got.local_tokens + got.peer_tokens
    local, peer = expected.local_tokens // size * size, expected.peer_tokens // size * size
    if got.why in _CHECK_FAILED:
        return Miss(MissReason.CHECK_FAILED, lost, "blocks changed, or could not be read, while they were copied")
    if got.why in _STALE:
        return Miss(MissReason.STALE, lost, "the source held less when the engine looked than when the request was planned")
    if got.why is DeliveryReason.NOT_EXCHANGING:
        return Miss(MissReason.OFF, lost, "the replica does not exchange with the source")
    if got.why is DeliveryReason.ALLOCATION:
        return Miss(MissReason.LOAD, lost, "the replica had no room for the import")
    if delivered >= local + peer:
        return Miss(
            MissReason.LOAD, lost, "waiting for, or importing from, the replica that holds more would have taken longer"
        )
    if delivered >= attempt.best_held_tokens // size * size:
        return Miss(MissReason.PROMISED, lost, "another request was computing it, and was not done when this one began")
    if not attempt.parity_exact:
        return Miss(MissReason.PARITY, lost, "its token ids were a guess, and the engine's differ")
    if got.local_tokens < local:
        return Miss(MissReason.EVICTED, lost, "the replica's blocks were given away between the plan and the first step")
    return Miss(MissReason.UNKNOWN, lost, "the engine does not say why it imported less")
