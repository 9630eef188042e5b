"""Where the prompt tokens of one request came from, by its engine's records."""

from __future__ import annotations

import msgspec

from gateway.ledger.attempts import Attempt
from transport.table.tiers import TierKind, tier_kind


class TokenSources(msgspec.Struct, frozen=True, gc=False):
    """Tokens of all prompts of a request; `source` is the first replica or tier that some were imported from, "" for none."""

    local: int
    peer: int
    host_memory: int
    disk: int
    vault: int
    computed: int
    source: str

    @property
    def cached(self) -> int:
        """Those that were not computed."""
        return self.local + self.peer + self.host_memory + self.disk + self.vault


def token_sources(attempt: Attempt) -> TokenSources | None:
    """None while the engine left no record of the attempt."""
    local = computed = 0
    imported: dict[TierKind | None, int] = {None: 0, "host_memory": 0, "disk": 0, "vault": 0}
    source = ""
    for delivery in attempt.deliveries:
        local += delivery.local_tokens
        computed += delivery.computed_tokens
        for each in delivery.sources():
            source = source or each.source
            imported[tier_kind(each.source)] += each.tokens
    if not attempt.deliveries:
        return None
    return TokenSources(
        local=local,
        peer=imported[None],
        host_memory=imported["host_memory"],
        disk=imported["disk"],
        vault=imported["vault"],
        computed=computed,
        source=source,
    )
