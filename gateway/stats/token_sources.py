"""Where the prompt tokens of one request came from, by its engine's records."""

from __future__ import annotations

from typing import NamedTuple

from gateway.ledger.attempts import Attempt
from transport.table.tiers import is_tier


class TokenSources(NamedTuple):
    """Tokens of all prompts of a request; `source` is the replica or the tier that some were imported from, "" for none."""

    local: int
    peer: int
    host_memory: int
    computed: int
    source: str

    @property
    def cached(self) -> int:
        """Those that were not computed."""
        return self.local + self.peer + self.host_memory


def token_sources(attempt: Attempt) -> TokenSources | None:
    """None while the engine left no record of the attempt."""
    local = peer = host_memory = computed = 0
    source = ""
    for delivery in attempt.deliveries:
        local += delivery.local_tokens
        computed += delivery.computed_tokens
        if delivery.peer_tokens:
            source = delivery.source
            if is_tier(source):
                host_memory += delivery.peer_tokens
            else:
                peer += delivery.peer_tokens
    return TokenSources(local, peer, host_memory, computed, source) if attempt.deliveries else None
