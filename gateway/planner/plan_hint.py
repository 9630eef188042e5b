"""What a plan tells the connector in the engine, in a request's kv_transfer_params."""

import os

from gateway.prompts.prompt_reader import KnownPrompt
from gateway.steering.steer import Decision
from transport.hint import Hint
from transport.node.names import as_seen_by, node_of

CHAT_IDS = "prompt_token_ids"
"""The key in kv_transfer_params under which vLLM's server takes a chat's token ids."""


def hint(known: KnownPrompt, decision: Decision, tag: int, held_tokens: int, *, imports: bool, here: str = "") -> Hint:
    """Tell the connector what to import, nothing where `imports` is off; `here` is what other nodes call this one.

    Without a source, it is told to look no further only if we know for certain what the replica holds: what it is still
    computing or importing may not be there in time, and then another replica may have it.
    """
    if decision.source is not None and known.cacheable:
        source = as_seen_by(node_of(decision.replica), decision.source, here)
        return Hint(source, tag, decision.import_tokens_max)
    if not imports or (known.certain and known.count == 1 and held_tokens >= decision.expected.local_tokens):
        return Hint("", tag)
    return Hint(tag=tag)


DRAWN = 64
"""Numbers drawn at a time: a call into the kernel takes ten times as long as handing one out."""


_BYTES = 8


class Tags:
    """Numbers from 1 to 2**62 that nobody can guess."""

    def __init__(self) -> None:
        self._drawn: list[int] = []

    def next(self) -> int:
        """Return a number that, with all but negligible chance of a mistake, was never returned before."""
        if not self._drawn:
            self._drawn = memoryview(os.urandom(DRAWN * _BYTES)).cast("Q").tolist()
        return (self._drawn.pop() >> 2) + 1
