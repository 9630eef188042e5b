"""Whether a replica has room for a pin, as far as that is known before anything is computed. Pure.

The engine counts different blocks (engine/connector/pins.py). So do we, by those kept prefixes that it has pinned: what two of
them share counts once. Where other gateways pin too, the engine may still refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gateway.block_registry.tables import Table
from gateway.errors import InvalidRequest
from gateway.kept_prefixes.book import KeptPrefix, PlaceState
from transport.groups import plain

_ID_BYTES = 4


class PinRoom(NamedTuple):
    """Blocks of one replica: what a pin adds, what pins hold, and what they may hold at most."""

    added: int
    taken: int
    most: int

    @property
    def suffices(self) -> bool:
        """Whether the pin fits."""
        return self.taken + self.added <= self.most


class PinTooLarge(InvalidRequest):
    """Too few replicas have room for the pin; `room` is that of one which has none."""

    def __init__(self, room: PinRoom, block_size: int) -> None:
        does = "Unpin another prefix, raise --pin-share-max, or keep it without a pin ('pin': false, `kv pin --no-pin`)."
        super().__init__(
            f"The pin needs {room.added} more blocks of {block_size} tokens on each of its replicas. There pins may take "
            f"{room.most} blocks, and {room.taken} are taken. {does}",
            code="pin_too_large",
        )


def pin_room(
    kept: KeptPrefix, others: Iterable[KeptPrefix], replica: str, table: Table | None, share_max: float | None
) -> PinRoom | None:
    """The room on a replica for a pin of `kept`; None where it is not known: several groups of blocks, or no share."""
    if share_max is None or table is None or not plain(table.groups):
        return None
    held = {
        block
        for other in others
        if (place := other.place(replica)) is not None and place.state is PlaceState.PINNED
        for block in _blocks(other, table.block_size)
    }
    added = sum(block not in held for block in _blocks(kept, table.block_size))
    # An idle engine counts pins whose time is up, and one that ran out of blocks has given up some that we count.
    return PinRoom(added, min(len(held), table.load().pinned_blocks), int(share_max * table.num_blocks))


def _blocks(kept: KeptPrefix, block_size: int) -> Iterator[int]:
    """A number for each whole block, that of two prefixes being the same where all tokens up to its end are."""
    raw, step, number = kept.ids.raw, block_size * _ID_BYTES, hash((kept.tenant, kept.model))
    for end in range(step, len(raw) + 1, step):
        number = hash((number, raw[end - step : end]))
        yield number
