"""The work of a replica that a request arriving now has to wait for."""

import msgspec

HEAD_DONE_MAX = 0.9
"""Of the prompt being computed, at most this share is assumed done while its first token is missing."""


class ReplicaLoad(msgspec.Struct, frozen=True, gc=False):
    """One replica's load. `tokens` and `pairs` are the work of the prompts sent there and not answered yet.

    The first of these, with `head_tokens` and `head_pairs`, has been computing since `since`. `engine_tokens` and
    `engine_pairs` are the engine's own count. `importing` and `reading` are imports under way to it and from it.
    """

    tokens: float = 0.0
    pairs: float = 0.0
    head_tokens: float = 0.0
    head_pairs: float = 0.0
    since: float = 0.0
    engine_tokens: float = 0.0
    engine_pairs: float = 0.0
    waiting: int = 0
    requests: int = 0
    decoding: int = 0
    importing: int = 0
    reading: int = 0

    def ahead(self, now: float, new_token: float, pair: float) -> tuple[float, float]:
        """Return the tokens and pairs that are still to be computed, at `new_token` and `pair` seconds each."""
        tokens, ahead_pairs = self.tokens, self.pairs
        whole = new_token * tokens + pair * ahead_pairs
        if whole > 0:
            done, done_max = now - self.since, HEAD_DONE_MAX * (new_token * self.head_tokens + pair * self.head_pairs)
            left = 1 - (done if done < done_max else done_max) / whole
            tokens, ahead_pairs = tokens * left, ahead_pairs * left
        said, said_pairs = self.engine_tokens, self.engine_pairs
        return tokens if tokens > said else said, ahead_pairs if ahead_pairs > said_pairs else said_pairs


IDLE = ReplicaLoad()
