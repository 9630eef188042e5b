"""Which tenants' prompts began with which token ids: enough to tell an eviction and a tenant boundary from a cold prompt.

What it learns across tenants is for the admin alone: a client that could tell "another tenant has sent this" from "nobody has"
would read the other's prompts token by token, which is what salts are there to prevent. So nothing here reaches an answer, and
nobody looks here before an answer is complete, so that it costs no client any time either.

Prefixes are known by digests keyed with a secret of this process, taken at lengths that grow by a quarter: a prompt of 100,000
tokens has 38. What is found is at most a quarter shorter than what was sent.
"""

import secrets
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import xxhash

from gateway.token_ids import TokenIds

STEP_TOKENS = 16
COPIED_BYTES_MAX = 8192  # parts of longer prompts are hashed where they are
PROMPT_TOKENS_MAX = 1 << 20
TENANTS_KEPT = 4  # of one prefix: the last ones that were new to it


def _lengths() -> tuple[int, ...]:
    lengths = [STEP_TOKENS]
    while lengths[-1] < PROMPT_TOKENS_MAX:
        lengths.append(max(lengths[-1] + STEP_TOKENS, lengths[-1] * 5 // 4 // STEP_TOKENS * STEP_TOKENS))
    return tuple(lengths)


LENGTHS = _lengths()
"""Lengths in tokens at which a prompt is known."""
_SPANS = tuple((4 * start, 4 * end) for start, end in pairwise((0, *LENGTHS)))
"""Where the token ids are, in bytes, that each of them adds."""

Marks = tuple[tuple[str, float], ...]
"""Tenants with the time by which they first had it, the last to come last."""


class SeenPrefixes:
    """At most `prefixes_max` digests, least recently seen out first."""

    def __init__(self, prefixes_max: int, secret: int | None = None) -> None:
        self._prefixes_max = prefixes_max
        self._secret = secrets.randbits(64) if secret is None else secret
        self._marks: OrderedDict[int, Marks] = OrderedDict()

    def __len__(self) -> int:
        return len(self._marks)

    def note(self, digests: Sequence[int], tenant: str, now: float) -> None:
        """Remember that a prompt of `tenant` with these `digests` was computed by `now`, in seconds of any one clock."""
        known, mark = self._marks, ((tenant, now),)
        for digest in reversed(digests):  # so that of a prefix the front is the last to be forgotten
            marks = known.get(digest)
            if marks is None:
                known[digest] = mark
                continue
            for name, _ in marks:
                if name == tenant:
                    break
            else:
                known[digest] = (marks + mark)[-TENANTS_KEPT:]
            known.move_to_end(digest)
        while len(known) > self._prefixes_max:
            known.popitem(last=False)

    def longest(self, digests: Sequence[int], tenant: str, before: float, more_than: int = 0) -> tuple[int, dict[str, int]]:
        """Return how many leading tokens were computed for `tenant` by the time `before`, and for each other tenant.

        Those of no more than `more_than` tokens are not looked for, and left out.
        """
        own = 0
        others: dict[str, int] = {}
        start = bisect_right(LENGTHS, more_than)  # whoever is known at a longer one is remembered at all shorter ones
        for place in range(start, len(digests)):
            marks = self._marks.get(digests[place])
            if marks is None:
                break
            for name, since in marks:
                if since > before:
                    continue
                if name == tenant:
                    own = LENGTHS[place]
                else:
                    others[name] = LENGTHS[place]
        return own, others

    def digests(self, ids: Sequence[int], kind: str = "") -> list[int]:
        """Digests of the beginnings of `ids` at LENGTHS; `kind` is what else tells prompts apart, such as an adapter."""
        digest_of, found = xxhash.xxh3_64_intdigest, []
        raw: bytes | memoryview = (ids if isinstance(ids, TokenIds) else TokenIds.of(ids[: LENGTHS[-1]])).raw
        size = len(raw)
        if size > COPIED_BYTES_MAX:
            raw = memoryview(raw)
        last = digest_of(kind.encode("utf-8", "surrogatepass"), self._secret) if kind else self._secret
        for start, end in _SPANS:
            if end > size:
                break
            last = digest_of(raw[start:end], last)  # keyed with that of what is before it
            found.append(last)
        return found
