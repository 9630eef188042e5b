"""Prefixes that somebody asked to keep, and where they are: pure bookkeeping, without clock or sockets.

A kept prefix is pinned in its replicas' caches, or only prewarmed there. The engines end pins by themselves when their time is
up; the book knows when that is and when to renew them. `now` is Unix time in seconds. keeper.py does what the book says.
"""

import secrets
from collections.abc import Container
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from gateway.errors import ApiError, InvalidRequest
from gateway.token_ids import TokenIds

RENEW_SHARE = 0.8  # share of its time after which a prefix is renewed
RENEW_SECONDS_MIN = 5.0  # between two attempts
_ID_BITS = 62


class PlaceState(StrEnum):
    """The state of a prefix on one replica."""

    PENDING = "pending"  # being computed or imported
    PINNED = "pinned"
    WARM = "warm"  # in its cache, and evicted like anything else
    REFUSED = "refused"  # in its cache, but the pin was refused: the share of blocks for pins is used up
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class PrefixPlace:
    """The prefix on one replica. The tokens tell where its KV came from the last time it was put there."""

    replica: str
    state: Annotated[
        PlaceState,
        Field(description="pending, pinned, warm (in the cache, not pinned), refused (pins are full) or failed"),
    ] = PlaceState.PENDING
    local_tokens: int = 0
    peer_tokens: int = 0
    computed_tokens: int = 0
    source: Annotated[str, Field(description="replica that it was imported from; empty if none")] = ""
    reason: Annotated[str, Field(description="what failed")] = ""


@dataclass(slots=True, kw_only=True)
class KeptPrefixAnswer:
    """A kept prefix."""

    id: str
    tenant: str
    model: str
    tokens: int
    whole_tokens: Annotated[int, Field(description="those of its whole blocks, which are all that is kept")]
    pin: bool
    renew: bool
    ttl: Annotated[float, Field(description="seconds")]
    created: Annotated[float, Field(description="Unix time, seconds")]
    expires: Annotated[float, Field(description="Unix time, seconds")]
    places: list[PrefixPlace]

    def place(self, replica: str) -> PrefixPlace | None:
        """Return the prefix's place on that replica, None if it was never put there."""
        return next((place for place in self.places if place.replica == replica), None)


@dataclass(slots=True, kw_only=True)
class KeptPrefix(KeptPrefixAnswer):
    """A kept prefix with what only its keeper needs to know: its token ids, how many replicas hold it, when to renew it."""

    ids: TokenIds
    replicas: int
    renew_at: float

    @property
    def number(self) -> int:
        """What identifies its pin to the engines."""
        return int(self.id, 16)


class TooManyPrefixes(InvalidRequest):
    """The book is full; deleting another prefix makes room."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} Delete another one first.", code="too_many_prefixes", status=409)


class UnknownPrefix(ApiError):
    """There is no kept prefix of that id, or its time is over."""

    status = 404
    type = "invalid_request_error"
    code = "prefix_not_found"

    def __init__(self, prefix_id: str) -> None:
        super().__init__(f"No prefix '{prefix_id}' is kept: it never was, or its time is up.")


class KeptPrefixBook:
    """At most `prefixes_max` prefixes with `tokens_max` tokens in total."""

    def __init__(self, prefixes_max: int, tokens_max: int) -> None:
        self._prefixes_max = prefixes_max
        self._tokens_max = tokens_max
        self._kept: dict[str, KeptPrefix] = {}

    def __contains__(self, kept: KeptPrefix) -> bool:
        return self._kept.get(kept.id) is kept

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def tokens(self) -> int:
        """Token ids that the book holds."""
        return sum(kept.tokens for kept in self._kept.values())

    def add(
        self,
        ids: TokenIds,
        *,
        tenant: str,
        model: str,
        replicas: int,
        ttl: float,
        pin: bool,
        renew: bool,
        block_size: int,
        now: float,
    ) -> KeptPrefix:
        """Add a prefix that is not placed anywhere yet. Raises TooManyPrefixes."""
        self.drop_expired(now)
        if len(self._kept) >= self._prefixes_max:
            raise TooManyPrefixes(f"{self._prefixes_max} prefixes are kept, which is the maximum.")
        if self.tokens + len(ids) > self._tokens_max:
            raise TooManyPrefixes(f"With it the kept prefixes would have more than {self._tokens_max} tokens.")
        kept = KeptPrefix(
            id=f"{secrets.randbits(_ID_BITS) + 1:016x}",
            tenant=tenant,
            model=model,
            tokens=len(ids),
            whole_tokens=len(ids) // block_size * block_size,
            pin=pin,
            renew=renew,
            ttl=ttl,
            created=now,
            expires=now + ttl,
            places=[],
            ids=ids,
            replicas=replicas,
            renew_at=now + RENEW_SHARE * ttl,
        )
        self._kept[kept.id] = kept
        return kept

    def get(self, prefix_id: str, now: float) -> KeptPrefix:
        """The kept prefix of that id. Raises UnknownPrefix."""
        self.drop_expired(now)
        if (kept := self._kept.get(prefix_id)) is None:
            raise UnknownPrefix(prefix_id)
        return kept

    def remove(self, prefix_id: str, now: float) -> KeptPrefix:
        """Take a prefix out of the book; the caller has to end its pins. Raises UnknownPrefix."""
        kept = self.get(prefix_id, now)
        del self._kept[prefix_id]
        return kept

    def discard(self, kept: KeptPrefix) -> None:
        """Take a prefix out of the book, if it is still in it."""
        self._kept.pop(kept.id, None)

    def place(self, kept: KeptPrefix, place: PrefixPlace) -> None:
        """Record the state of a prefix on a replica."""
        former = kept.place(place.replica)
        if former is None:
            kept.places.append(place)
        else:
            kept.places[kept.places.index(former)] = place

    def renewed(self, kept: KeptPrefix, now: float) -> None:
        """Restart its time."""
        kept.expires = now + kept.ttl
        kept.renew_at = now + RENEW_SHARE * kept.ttl

    def due(self, now: float) -> list[KeptPrefix]:
        """Return the prefixes to renew now; each is due again after RENEW_SECONDS_MIN at the earliest."""
        self.drop_expired(now)
        found = [kept for kept in self._kept.values() if kept.renew and kept.renew_at <= now]
        for kept in found:
            kept.renew_at = now + RENEW_SECONDS_MIN
        return found

    def lost(self, replica: str, reason: str, states: Container[PlaceState] = tuple(PlaceState)) -> list[KeptPrefix]:
        """What a replica kept in these `states` is gone: returns the prefixes. Renewed ones are due at once."""
        found = []
        for kept in self._kept.values():
            place = kept.place(replica)
            if place is not None and place.state is not PlaceState.FAILED and place.state in states:
                self.place(kept, PrefixPlace(replica, PlaceState.FAILED, reason=reason))
                kept.renew_at = 0.0
                found.append(kept)
        return found

    def all(self, now: float) -> list[KeptPrefix]:
        """Return every kept prefix, oldest first."""
        self.drop_expired(now)
        return list(self._kept.values())

    def drop_expired(self, now: float) -> None:
        """Forget prefixes whose time is up; renewed ones stay until they are deleted."""
        for prefix_id in [each for each, kept in self._kept.items() if kept.expires <= now and not kept.renew]:
            del self._kept[prefix_id]
