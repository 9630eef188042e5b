"""Keeps the ledger: between the relay, which knows when things happen, and the tables, which tell what was delivered."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from gateway.block_registry.delivery_feed import DeliveryFeed
from gateway.block_registry.registry import LookUp
from gateway.block_registry.tables import Table
from gateway.ledger.attempts import Entry, Planned
from gateway.ledger.history import SeenPrefixes
from gateway.ledger.ledger import Ledger
from gateway.ledger.misses import MissReason, useful_tokens
from gateway.ledger.waiting_prompts import PROMPTS_BYTES_MAX, WaitingPrompts
from transport.table.deliveries import Delivery

SETTLED_TOGETHER = 16
"""Attempts that end before those among them are settled of which all is known: together they take two thirds of the time.

Who looks at the figures has all of them settled first.
"""
PROMPT_TOKENS_EACH = 4096
"""An attempt counts once more for so many tokens: settling hashes them, and until then they are held."""
_REASONS = {reason: f", reason={reason}".encode() for reason in MissReason}


class Prefixes(Protocol):
    """Finds who holds a prompt, in the live tables."""

    def look_up(self, ids: Sequence[int], salt: str = "", lora: str = "") -> LookUp: ...


class Recorder:
    """Belongs to the event loop's thread. `salt_of` gives a tenant's salt by its name.

    `later` does what no answer should wait for, at once by default.
    """

    def __init__(
        self,
        ledger: Ledger,
        seen: SeenPrefixes,
        feed: DeliveryFeed,
        prefixes: Prefixes,
        salt_of: Callable[[str], str | None],
        clock: Callable[[], float] = time.monotonic,
        prompts_bytes_max: int = PROMPTS_BYTES_MAX,
        later: Callable[[Callable[[], None]], object] = lambda work: work(),
    ) -> None:
        self.ledger = ledger
        self.feed = feed
        self._seen = seen
        self._prefixes = prefixes
        self._salt_of = salt_of
        self._clock = clock
        self._prompts = WaitingPrompts(prompts_bytes_max)
        self._later = later
        self._ended = 0
        self._due: deque[Entry] = deque()
        feed.add(self._delivered)

    @property
    def waiting(self) -> int:
        """Attempts whose prompts are kept though they are over, as their records may still come."""
        return len(self._prompts)

    def sent(self, planned: Planned, ids: Sequence[int] | None, lora: str = "") -> Entry:
        """An attempt goes to its replica; `ids` are its prompt if that is known, for the adapter `lora`."""
        return self.ledger.open(planned, self._clock(), ids, lora)

    def first_byte(self, entry: Entry) -> bytes:
        """The first byte of its answer came; return the value of the header x-peerkv-cache, empty if nothing is known."""
        self.ledger.first_byte(entry, self._clock())
        if not entry.deliveries:
            self.feed.poll(entry.planned.replica)
        return cache_header(entry)

    def ended(self, entry: Entry, status: int) -> None:
        """The attempt is over, with this HTTP status, or one of gateway.ledger's for those without an answer."""
        if not entry.deliveries:
            self.feed.poll(entry.planned.replica)
        if not self.ledger.ended(entry, status, self._clock()):
            self._prompts.keep(entry)
        self._ended += 1 + entry.planned.prompt_tokens // PROMPT_TOKENS_EACH
        if self._ended >= SETTLED_TOGETHER:
            self._ended = 0
            self._later(self._settle_due)

    def catch_up(self) -> None:
        """Read what is new in all tables and settle what can be: before somebody looks at the figures."""
        self.feed.refresh()
        self._settle_due()

    def _settle_due(self) -> None:
        due = self._due
        due += self.ledger.due(self._clock())
        for replica in {entry.planned.decision.replica for entry in due}:
            self.feed.poll(replica)  # a request of several choices has several records
        while due:  # one that can not be settled takes no other with it
            entry = due.popleft()
            if entry.settle_until:
                self._prompts.drop(entry)
            self.ledger.settle(entry, *self._history(entry))

    def _delivered(self, replica: str, table: Table, delivery: Delivery) -> None:
        self.ledger.delivered(delivery)

    def _history(self, entry: Entry) -> tuple[int, int]:
        """What of the prompt this tenant had computed before, and other tenants' blocks hold now, in tokens of whole blocks.

        Nothing is looked for where the record explains everything; what the attempt computed is remembered.
        """
        got, ids, planned = entry.steered, entry.ids, entry.planned
        if got is None or ids is None or not got.first_token_ns:
            return 0, 0
        block_size, delivered, tenant = planned.block_size, got.local_tokens + got.peer_tokens, planned.asked.tenant
        useful = useful_tokens(got.prompt_tokens, block_size)
        if delivered >= useful:
            return 0, 0
        digests = self._seen.digests(ids, entry.lora)
        formerly = elsewhere = 0
        if delivered >= planned.decision.best_available_tokens // block_size * block_size:
            own, others = self._seen.longest(digests, tenant, entry.sent_at, delivered)
            formerly = min(own, useful) // block_size * block_size
            if formerly <= delivered:
                formerly, elsewhere = 0, self._held_for(others, ids, entry.lora, delivered) if others else 0
        self._seen.note(digests, tenant, entry.sent_at + (entry.ended_seconds or 0.0))
        return formerly, elsewhere

    def _held_for(self, others: dict[str, int], ids: Sequence[int], lora: str, more_than: int) -> int:
        """The most that blocks of one of the other tenants hold: their tables are asked, under their salts."""
        most = 0
        for tenant, length in others.items():
            salt = self._salt_of(tenant)
            if salt is None or length <= more_than:
                continue
            most = max(most, self._prefixes.look_up(ids[: length + 1], salt, lora).held_tokens_max)
        return most


def cache_header(entry: Entry) -> bytes:
    """Where the prompt's tokens came from, as a dictionary of structured fields (RFC 9651); empty if not known.

    The reason says nothing of what others have sent: an eviction or a tenant boundary that only the tables' history shows is
    `cold` here, as it is to the client.
    """
    found, steered = entry.deliveries, entry.steered
    if steered is None or not steered.scheduled_ns:
        return b""
    local, peer, computed = steered.local_tokens, steered.peer_tokens, steered.computed_tokens
    if len(found) > 1:
        local = sum(delivery.local_tokens for delivery in found)
        peer = sum(delivery.peer_tokens for delivery in found)
        computed = sum(delivery.computed_tokens for delivery in found)
    source = f', source="{steered.source}"'.encode("latin-1") if steered.peer_tokens else b""
    return b"local=%d, peer=%d, computed=%d%b%b" % (local, peer, computed, source, _REASONS[entry.judged().reason])
