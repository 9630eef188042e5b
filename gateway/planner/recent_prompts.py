"""The prompts of the last requests, so that what is asked for most can be put into another cache in time."""

from collections import deque

from gateway.block_registry.chain import Chain
from gateway.planner.plan import PlanningRequest
from transport.keys import KEY_BYTES

PROMPTS_MAX = 256
TOKENS_MAX = 1_000_000
"""Of all that are remembered together; up to 11 bytes each."""


class RecentPrompts:
    """At most PROMPTS_MAX, in the gateway's memory alone. Belongs to one thread."""

    def __init__(self, tokens_max: int = TOKENS_MAX) -> None:
        self._tokens_max = tokens_max
        self._tokens = 0
        self._noted: deque[tuple[Chain, PlanningRequest]] = deque()

    def note(self, chain: Chain, request: PlanningRequest) -> None:
        """A request came; `chain` are the keys of its prompt."""
        noted = self._noted
        noted.append((chain, request))
        self._tokens += request.known.tokens
        while len(noted) > PROMPTS_MAX or self._tokens > self._tokens_max:
            self._tokens -= noted.popleft()[1].known.tokens

    def beginning_with(self, key: bytes, blocks: int) -> PlanningRequest | None:
        """Return the newest request whose prompt has the prefix of so many blocks that `key` names, None for none."""
        at = slice((blocks - 1) * KEY_BYTES, blocks * KEY_BYTES)
        for chain, request in reversed(self._noted):
            if chain.blocks >= blocks and chain.raw[at] == key:
                return request
        return None
