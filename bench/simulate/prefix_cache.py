"""A replica's KV memory: shared prefix blocks in least-recently-used order, and the private memory of running requests."""

from collections import OrderedDict
from collections.abc import Callable, Sequence


class PrefixCache:
    """Counts tokens of KV. A block is a trace's id with its number of tokens; unused blocks stay until
    their room is needed, least recently used first, as in vLLM. Memory that is not shared (the last, partial block,
    generated tokens, prompts not yet computed) is a number of private tokens.

    `evicted(block)` is called when a block is given up.
    """

    __slots__ = (
        "_evicted",
        "_idle",
        "_idle_tokens",
        "_tokens",
        "_users",
        "cached_tokens",
        "capacity_tokens",
        "evicted_tokens",
        "private_tokens",
    )

    def __init__(self, capacity_tokens: int, evicted: Callable[[int], None]) -> None:
        self.capacity_tokens = capacity_tokens
        self.cached_tokens = 0
        self.private_tokens = 0
        self.evicted_tokens = 0
        self._evicted = evicted
        self._tokens: dict[int, int] = {}
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._idle_tokens = 0

    def __contains__(self, block: int) -> bool:
        return block in self._tokens

    @property
    def used_tokens(self) -> int:
        """Tokens of all kinds, never above the capacity."""
        return self.cached_tokens + self.private_tokens

    @property
    def room_tokens(self) -> int:
        """Tokens that would be free after evicting every unused block."""
        return self.capacity_tokens - self.used_tokens + self._idle_tokens

    def match(self, chain: Sequence[int]) -> int:
        """Return how many leading blocks of the chain are held."""
        held = self._tokens
        count = 0
        for block in chain:
            if block not in held:
                return count
            count += 1
        return count

    def use(self, blocks: Sequence[int]) -> None:
        """Keep held blocks for a request until `release`."""
        users, idle = self._users, self._idle
        for block in blocks:
            if users[block] == 0:
                del idle[block]
                self._idle_tokens -= self._tokens[block]
            users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Release a request's blocks; its last ones will be evicted before its first ones."""
        users, idle, tokens = self._users, self._idle, self._tokens
        for block in reversed(blocks):
            users[block] -= 1
            if users[block] == 0:
                idle[block] = None
                self._idle_tokens += tokens[block]

    def reserve(self, tokens: int) -> bool:
        """Take `tokens` of private memory, evicting unused blocks as needed. False, without effect, if there is no room."""
        if tokens > self.room_tokens:
            return False
        self.private_tokens += tokens
        while self.cached_tokens + self.private_tokens > self.capacity_tokens:
            self._evict()
        return True

    def unreserve(self, tokens: int) -> None:
        """Give private memory back."""
        self.private_tokens -= tokens

    def share(self, block: int, tokens: int) -> None:
        """Turn reserved memory into a block that its request uses; if the block is already held, use that one."""
        self.private_tokens -= tokens
        if block in self._tokens:
            self.use((block,))
            return
        self._tokens[block] = tokens
        self._users[block] = 1
        self.cached_tokens += tokens

    def leave(self, block: int, tokens: int) -> None:
        """Turn reserved memory into an unused block: what a finished request generated."""
        self.share(block, tokens)
        self.release((block,))

    def _evict(self) -> None:
        block, _ = self._idle.popitem(last=False)
        tokens = self._tokens.pop(block)
        del self._users[block]
        self._idle_tokens -= tokens
        self.cached_tokens -= tokens
        self.evicted_tokens += tokens
        self._evicted(block)
