"""One request on its way through a simulated replica."""

from dataclasses import dataclass, field

from bench.simulate.traces import TraceRequest


@dataclass(eq=False, slots=True)
class Job:
    """A request and what has become of it; times are simulated seconds, tokens are of the prompt unless said otherwise.

    `chain` are the trace's blocks that a cache can hold. This job keeps `held` of them in the replica's cache, and
    `private_tokens` of memory are its own.
    """

    tag: int
    request: TraceRequest
    chain: tuple[int, ...]
    replica: int = -1
    source: int | None = None
    import_tokens_max: int | None = None
    planned_tokens: int = 0

    arrived: float = 0.0
    asked: float = 0.0
    scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    import_seconds: float = 0.0

    local_tokens: int = 0
    peer_tokens: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0  # again, after a preemption
    stale_tokens: int = 0  # promised by the source's table, given up before the copy was done
    import_bytes: int = 0

    tried_import: bool = False
    admitted: bool = False
    target_tokens: int = 0  # to be in the cache before the next token can be generated
    ready_tokens: int = 0  # of those: in the cache or being computed in this step
    held: int = 0
    private_tokens: int = 0
    generated: int = 0
    decodes_since: int = 0
    importing: tuple[int, ...] = field(default=(), repr=False)

    @property
    def left_tokens(self) -> int:
        """Tokens to compute before the next token can be generated."""
        return self.target_tokens - self.ready_tokens


def cacheable(request: TraceRequest, trace_block_tokens: int, block_tokens: int) -> tuple[int, ...]:
    """Return the blocks of a request that a cache of `block_tokens` can hold: the last one only if it is full."""
    tail = request.prompt_tokens - (len(request.blocks) - 1) * trace_block_tokens
    return request.blocks if tail >= block_tokens else request.blocks[:-1]


def covered_tokens(count: int, prompt_tokens: int, trace_block_tokens: int, block_tokens: int) -> int:
    """Return the tokens in the first `count` blocks of a prompt's chain."""
    return min(count * trace_block_tokens, prompt_tokens // block_tokens * block_tokens)


def useful_tokens(tokens: int, prompt_tokens: int, block_tokens: int) -> int:
    """Return how many of `tokens` cached ones an engine uses: whole blocks; the last token is always computed."""
    return min(tokens, (prompt_tokens - 1) // block_tokens * block_tokens)
