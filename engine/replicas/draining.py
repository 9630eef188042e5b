"""Waits until replicas that get no new requests have finished those that they have."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from engine.fleet import ReplicaState
from engine.replicas.member import Member
from transport.table.deliveries import EngineLoad

POLL_SECONDS = 0.1
QUIET_SECONDS = 0.5
"""For so long a replica has to have no request: one may have been on its way, and the end of an answer still is."""


class LoadedTable(Protocol):
    """The part of an engine's block table that is needed here."""

    def load(self) -> EngineLoad: ...


async def requests_of(member: Member, table: LoadedTable | None) -> int | None:
    """Requests that the replica has, by its engine's table if there is one, else by vLLM's metrics; None if nobody says."""
    if table is None:
        return await member.probe.requests()
    load = table.load()
    return load.waiting_requests + load.running_requests


async def idle_in(members: Sequence[Member], tables: Callable[[], Mapping[str, LoadedTable]], seconds: float) -> bool:
    """Wait until those of `members` that are DRAINING have no requests, `seconds` at most; tell whether that is so.

    One that ends has none either; one that does not say how many it has counts as busy.
    """
    loop = asyncio.get_running_loop()
    end, busy_at = loop.time() + seconds, dict.fromkeys((member.name for member in members), loop.time())
    while True:
        now, found = loop.time(), tables()
        left = [member for member in members if member.life.state is ReplicaState.DRAINING]
        for member in left:
            if await requests_of(member, found.get(member.name)) != 0:
                busy_at[member.name] = now
        if all(now - busy_at[member.name] >= QUIET_SECONDS for member in left):
            return True
        if now >= end:
            return False
        await asyncio.sleep(min(POLL_SECONDS, max(0.0, end - now)))
