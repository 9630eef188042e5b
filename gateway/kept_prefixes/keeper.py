"""Puts kept prefixes into replicas' caches, pins them there, and renews and ends pins, as the book (book.py) says.

A prefix is put on a replica by a request for one token, planned like any other, so that it is imported if that is cheaper than
computing it. Pins travel in its hint; the engine ends them by itself when their time is up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from engine.fleet import FleetView, Replica
from gateway.block_registry.fleet_state import FleetState
from gateway.block_registry.registry import LookUp
from gateway.errors import ApiError, InvalidRequest, NoReplicaReady, Unavailable
from gateway.kept_prefixes.book import KeptPrefix, KeptPrefixBook, PlaceState, PrefixPlace
from gateway.kept_prefixes.pin_room import PinRoom, PinTooLarge, pin_room
from gateway.kept_prefixes.prefix_reader import Callers, PrefixReader
from gateway.kept_prefixes.prewarm import Prewarmer, body_for
from gateway.kept_prefixes.shapes import FlushedPrefixes, PrefixRemoved, PrefixRequest
from gateway.ledger.attempts import Attempt, RequestInfo
from gateway.ledger.recorder import Recorder
from gateway.planner.planner import Planner
from gateway.token_ids import TokenIds
from gateway.upstream.pool import Upstream
from transport.hint import PinWish, read_hint, write_hint

_logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
_REFUSED = "pins_refused"


class Keeper:
    """Keeps prefixes. Belongs to the event loop's thread; prefixes are placed one after the other.

    `seconds_max` bounds each request to a replica; `pin_share_max` is the replicas' own, None where that is not known;
    `wall_clock` gives Unix time in seconds.
    """

    def __init__(
        self,
        book: KeptPrefixBook,
        *,
        fleet: FleetView,
        planner: Planner,
        upstream: Upstream,
        reader: PrefixReader,
        tenants: Callers,
        recorder: Recorder,
        seconds_max: float,
        pin_share_max: float | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.book = book
        self._fleet = fleet
        self._planner = planner
        self._prewarmer = Prewarmer(fleet, upstream, recorder, seconds_max)
        self._reader = reader
        self._tenants = tenants
        self._pin_share_max = pin_share_max
        self._wall_clock = wall_clock
        self._placing = asyncio.Lock()
        self._pids: dict[str, int | None] = {}

    def all(self) -> list[KeptPrefix]:
        """Every kept prefix."""
        return self.book.all(self._wall_clock())

    async def keep(self, wanted: PrefixRequest) -> KeptPrefix:
        """Put a prefix on as many replicas as requested; return once it is there or has failed there.

        Raises ApiError: InvalidRequest, TooManyPrefixes, PinTooLarge, NoReplicaReady, Unavailable when no replica took it.
        """
        tenant, ids, block_size = await self._reader.read(wanted)
        ready = self._fleet.snapshot().ready()
        if not ready:
            raise NoReplicaReady
        if wanted.replicas > len(ready):
            raise InvalidRequest(f"'replicas': only {len(ready)} are ready.", param="replicas")
        kept = self.book.add(
            ids,
            tenant=tenant.name,
            model=wanted.model,
            replicas=wanted.replicas,
            ttl=wanted.ttl,
            pin=wanted.pin,
            renew=wanted.renew,
            block_size=block_size,
            now=self._wall_clock(),
        )
        self._check_room(kept, ready, block_size)
        await self._place_or_drop(kept)
        return kept

    async def undo(self, prefix_id: str) -> PrefixRemoved:
        """Forget a prefix and end its pins. Raises UnknownPrefix."""
        done = PrefixRemoved(id=prefix_id, unpinned=[], failed={})
        async with self._placing:
            kept = self.book.remove(prefix_id, self._wall_clock())
            self._planner.promotions.tiers.unpin(kept.number)
            for place in kept.places:
                if place.state is PlaceState.PINNED:
                    try:
                        await self._unpin(kept, place.replica)
                        done.unpinned.append(place.replica)
                    except ApiError as error:
                        done.failed[place.replica] = error.message
        return done

    def flushed(self, emptied: Iterable[str], tried: Iterable[str]) -> FlushedPrefixes:
        """Note that these replicas' caches were emptied, or that it was tried, which ends pins all the same.

        What is renewed is put back by `run`.
        """
        self.book.drop_expired(self._wall_clock())
        lost = [kept for name in emptied for kept in self.book.lost(name, "its cache was flushed")]
        for name in tried:
            lost += self.book.lost(name, "a flush that failed ended its pin", (PlaceState.PINNED,))
        found = {kept.id: kept for kept in lost}
        return FlushedPrefixes(kept=len(found), renewed=sum(kept.renew for kept in found.values()))

    async def run(self) -> None:
        """Renew what is due, until cancelled. Raises FleetError if the fleet cannot be read."""
        while True:
            self._notice_restarts()
            for kept in self.book.due(self._wall_clock()):
                await self._place(kept)
            await asyncio.sleep(POLL_SECONDS)

    # Where it goes

    def _check_room(self, kept: KeptPrefix, ready: Sequence[Replica], block_size: int) -> None:
        """Forget a pin for which too few replicas have room. Raises PinTooLarge."""
        rooms = [self._room(kept, replica.name) for replica in ready]
        short = [room for room in rooms if room is not None and not room.suffices]
        if short and len(rooms) - len(short) < kept.replicas:
            self.book.discard(kept)
            raise PinTooLarge(min(short), block_size)

    def _room(self, kept: KeptPrefix, replica: str) -> PinRoom | None:
        """What is known of the room for its pin, None where there is nothing to pin."""
        table = self._planner.fleet.now().tables.get(replica)
        return pin_room(kept, self.all(), replica, table, self._pin_share_max) if kept.pin else None

    async def _place_or_drop(self, kept: KeptPrefix) -> None:
        try:
            await self._place(kept)
        except BaseException:
            self.book.discard(kept)
            raise
        if all(place.state is PlaceState.FAILED for place in kept.places):
            self.book.discard(kept)
            raise Unavailable("No replica took it: " + "; ".join(f"{p.replica}: {p.reason}" for p in kept.places))

    async def _place(self, kept: KeptPrefix) -> None:
        """Put the prefix on its replicas, starting with those that hold it, so that others can import from there."""
        async with self._placing:
            if kept not in self.book:
                return
            taken = 0
            for replica in self._candidates(kept):
                if taken == kept.replicas:
                    break
                place = await self._put(kept, replica)
                self.book.place(kept, place)
                taken += place.state is not PlaceState.FAILED
            if taken:
                self.book.renewed(kept, self._wall_clock())
            if any(place.state is PlaceState.PINNED for place in kept.places):
                self._pin_below(kept)

    def _pin_below(self, kept: KeptPrefix) -> None:
        """Have this node's disk keep the prefix as long."""
        state = self._planner.fleet.now()
        chains = self._look_up(
            kept, TokenIds.joined([kept.ids, TokenIds.of([0])]), state
        ).chains  # they end before the last token
        pins = [(kind.fingerprint, chain.raw) for kind, (chain, _) in zip(state.kinds, chains, strict=True)]
        self._planner.promotions.tiers.pin(kept.number, pins, kept.ttl)

    def _look_up(self, kept: KeptPrefix, ids: TokenIds, state: FleetState | None = None) -> LookUp:
        tenant = self._tenants.named(kept.tenant)
        lora = self._planner.prompts.adapter({"model": kept.model})
        return self._planner.registry.look_up(state or self._planner.fleet.now(), ids, tenant.salt if tenant else "", lora)

    def _candidates(self, kept: KeptPrefix) -> list[Replica]:
        """Return the ready replicas: who keeps it first, then who has room, then by what they hold and do."""
        look_up = self._look_up(kept, kept.ids)
        busy = self._planner.in_flight()

        def rank(replica: Replica) -> tuple[bool, bool, int, int, str]:
            place = kept.place(replica.name)
            keeps = place is not None and place.state is not PlaceState.FAILED
            room = self._room(kept, replica.name)
            full = room is not None and not room.suffices
            return not keeps, full, -look_up.blocks.get(replica.name, 0), busy.get(replica.name, 0), replica.name

        return sorted(self._fleet.snapshot().ready(), key=rank)

    async def _put(self, kept: KeptPrefix, replica: Replica) -> PrefixPlace:
        """Send a request for one token with the pin in its hint; failures are recorded, not raised."""
        place = PrefixPlace(replica.name)
        self.book.place(kept, place)
        refused = self._refusals(replica.name)
        pin = PinWish(kept.number, kept.ttl) if kept.pin else None
        try:
            attempt = await self._request(kept, replica.name, kept.ids, pin=pin)
        except ApiError as error:
            _logger.warning("prefix %s is not kept on %s: %s", kept.id, replica.name, error.message)
            return replace(place, state=PlaceState.FAILED, reason=error.message)
        state = PlaceState.WARM
        if kept.pin:
            state = PlaceState.PINNED if self._refusals(replica.name) == refused else PlaceState.REFUSED
        if state is PlaceState.REFUSED:
            place = replace(place, reason=self._why_refused(replica.name))
        got = attempt.steered
        if got is None:
            return replace(place, state=state)
        return replace(
            place,
            state=state,
            local_tokens=got.local_tokens,
            peer_tokens=got.peer_tokens,
            computed_tokens=got.computed_tokens,
            source=got.source if got.peer_tokens else "",
        )

    async def _unpin(self, kept: KeptPrefix, replica: str) -> None:
        await self._request(kept, replica, TokenIds.of([kept.ids[0]]), unpin=(kept.number,))

    async def _request(self, kept: KeptPrefix, replica: str, ids: TokenIds, **pins: Any) -> Attempt:
        """Have the replica compute one token after `ids`; `pins` are what the hint says of pins. Raises ApiError."""
        tenant = self._tenants.named(kept.tenant)
        if tenant is None:
            raise InvalidRequest(f"There is no tenant '{kept.tenant}' any more.")
        body = body_for(ids, kept.model)
        plan = await self._planner.plan("completions", body, tenant, wanted_replica=replica)
        if plan.kv_transfer_params is None:
            raise Unavailable(f"{replica} has no block table.")
        body["kv_transfer_params"] = write_hint(msgspec.structs.replace(read_hint(plan.kv_transfer_params), **pins))
        info = RequestInfo(f"prefix-{kept.id}", "completions", kept.tenant, kept.model)
        return await self._prewarmer.send(plan, body, info)

    def _refusals(self, replica: str) -> int:
        table = self._planner.fleet.now().tables.get(replica)
        return table.counters().get(_REFUSED, 0) if table is not None else 0

    def _why_refused(self, replica: str) -> str:
        """Why the engine refused a pin, as far as can be told."""
        table = self._planner.fleet.now().tables.get(replica)
        pinned = table.load().pinned_blocks if table is not None else 0
        why = f"pins, which hold {pinned} blocks there, have no room for it, or its blocks were needed for requests"
        return f"{why}; unpin another prefix or raise --pin-share-max"

    def _notice_restarts(self) -> None:
        """Note that what a replica kept is gone if another process serves under its name."""
        for replica in self._fleet.snapshot().replicas:
            before = self._pids.get(replica.name, replica.pid)
            if before is not None and replica.pid != before:
                self.book.lost(replica.name, "the replica was restarted")
            self._pids[replica.name] = replica.pid
