"""Attempts as they are begun, by what matters to a test."""

from gateway.api.endpoints import Endpoint
from gateway.ledger.attempts import Attempt, RequestInfo
from gateway.steering.choices import Choice, Decision, Expected, Option


def begun(
    tag: int = 1,
    *,
    request_id: str = "r",
    at: float = 0.0,
    began_at: float = 0.0,
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
    formerly_tokens: int = 0,
    reports: bool = True,
) -> Attempt:
    """`seconds` are those of the queue, the transfer and the prefill; without `options` there was one, which was taken."""
    expected = Expected(*seconds, local_tokens, peer_tokens, prompt_tokens - local_tokens - peer_tokens)
    options = options or (Option(replica, source, action, None, expected, expected.seconds),)
    decision = Decision(replica, source, action, None, expected, best_available_tokens, options)
    return Attempt(
        info=RequestInfo(request_id, endpoint, tenant, model),
        decision=decision,
        tag=tag,
        at=at,
        began_at=began_at,
        prompt_tokens=prompt_tokens,
        block_size=block_size,
        best_held_tokens=best_held_tokens,
        formerly_tokens=formerly_tokens,
        reports=reports,
    )
