"""What the ledger adds up: counted, shown in /kv/stats and named for Prometheus in one shape."""

from dataclasses import dataclass, field, replace
from typing import Annotated

from pydantic import Field

from gateway.ledger.misses import Miss, MissReason


def _by_reason() -> dict[str, int]:
    return {reason.value: 0 for reason in MissReason}


@dataclass(slots=True)
class LedgerStats:
    """Finished attempts to serve requests, including retries, and the prompt tokens lost to each reason."""

    kept: Annotated[int, Field(description="attempts that /kv/explain knows")] = 0
    settled: Annotated[int, Field(description="attempts that are finished and judged")] = 0
    prompt_tokens: Annotated[int, Field(description="tokens of their prompts, if the token ids were known")] = 0
    predicted_tokens: Annotated[int, Field(description="of these, expected from a cache")] = 0
    best_available_tokens: Annotated[int, Field(description="of these, held by the replica that held most")] = 0
    local_tokens: Annotated[int, Field(description="delivered from the replica's own cache")] = 0
    peer_tokens: Annotated[int, Field(description="delivered from another replica")] = 0
    computed_tokens: Annotated[int, Field(description="computed")] = 0
    unmatched_deliveries: Annotated[int, Field(description="engines' records of requests that are not in the ledger")] = 0
    missed_deliveries: Annotated[int, Field(description="engines' records that were overwritten before they were read")] = 0
    dropped: Annotated[int, Field(description="attempts forgotten before they were finished: the ledger is too small")] = 0
    requests: Annotated[dict[str, int], Field(description="attempts by the reason for the miss")] = field(
        default_factory=_by_reason
    )
    lost_tokens: Annotated[
        dict[str, int], Field(description="tokens computed although they had been computed before, by reason")
    ] = field(default_factory=_by_reason)

    def count(self, miss: Miss) -> None:
        """Count an attempt by its reason."""
        self.requests[miss.reason] += 1
        self.lost_tokens[miss.reason] += miss.tokens

    def shown(self, kept: int, missed_deliveries: int) -> "LedgerStats":
        """Return a copy with what others count."""
        return replace(
            self,
            kept=kept,
            missed_deliveries=missed_deliveries,
            requests=dict(self.requests),
            lost_tokens=dict(self.lost_tokens),
        )
