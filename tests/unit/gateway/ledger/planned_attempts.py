"""Plans as the ledger keeps them, by what matters to a test."""

from gateway.api.body import Endpoint
from gateway.ledger.attempts import Asked, Planned
from gateway.steering.choices import Choice, Decision, Expected, Option


def planned(
    tag: int = 1,
    *,
    request_id: str = "r",
    at: float = 0.0,
    endpoint: Endpoint = "completions",
    tenant: str = "one",
    model: str = "",
    replica: str = "a",
    source: str | None = None,
    action: Choice = Choice.RECOMPUTE,
    prompt_tokens: int = 100,
    block_size: int = 4,
    local_tokens: int = 0,
    peer_tokens: int = 0,
    best_available_tokens: int = 0,
    best_held_tokens: int = 0,
    seconds: tuple[float, float, float] = (0.0, 0.0, 0.0),
    options: tuple[Option, ...] = (),
    reports: bool = True,
) -> Planned:
    """`seconds` are those of the queue, the transfer and the prefill; without `options` there was one, which was taken."""
    expected = Expected(*seconds, local_tokens, peer_tokens, prompt_tokens - local_tokens - peer_tokens)
    options = options or (Option(replica, source, action, None, expected, expected.seconds),)
    decision = Decision(replica, source, action, None, expected, best_available_tokens, options)
    return Planned(
        Asked(request_id, endpoint, tenant, model),
        decision,
        tag,
        at,
        prompt_tokens,
        block_size,
        best_held_tokens,
        reports=reports,
    )
