"""KV cache groups: which blocks of a prefix each kind of layer needs, and how much of a prefix a holder can supply.

A model's layers fall into groups that allocate blocks from one pool. Full attention reads every block before a token, a
sliding window the blocks that the window reaches, a state layer (Mamba, gated delta net) only the state at the token before.
"""

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

Kind = Literal["full", "window", "chunk", "state"]
GROUPS_MAX = 64
_TRIES_MAX = 512
"""Look-ups in search of a length at which every group has its blocks: whoever holds every other block shall stall nobody."""


class Group(msgspec.Struct, frozen=True):
    """One group. `block_size` is in tokens; `bytes` are those of a block over the group's `layers` on one rank.

    `window` is, in tokens: for a sliding window how far back a token sees, itself included; for chunked local attention the
    size of a chunk; 0 otherwise.
    """

    kind: Kind
    block_size: int
    window: int = 0
    layers: int = 0
    bytes: int = 0

    def first_needed(self, tokens: int) -> int:
        """Return the first block that is read by whatever is computed behind `tokens`, a multiple of the block size.

        It never falls as `tokens` grows. Source: get_num_skipped_tokens in vLLM's v1/core/single_type_kv_cache_manager.py.
        """
        if self.kind == "full":
            return 0
        if self.kind == "state":
            unread = tokens - 1
        elif self.kind == "chunk":
            unread = tokens // self.window * self.window
        else:
            unread = tokens - self.window + 1
        return max(0, unread) // self.block_size

    @property
    def token_bytes(self) -> float:
        """Bytes that each token of an import brings into one rank: 0 where only the end of a prefix is needed."""
        return self.bytes / self.block_size if self.kind == "full" else 0.0

    @property
    def import_bytes(self) -> float:
        """Bytes that any long import brings into one rank, whatever its length: those of a window, half a chunk or a state."""
        if self.kind == "full":
            return 0.0
        seen = {"window": self.window - 1, "chunk": self.window / 2, "state": self.block_size}[self.kind]
        return math.ceil(seen / self.block_size) * float(self.bytes)


class Holder(Protocol):
    """What somebody holds of one chain, block by block of a group (an index into the list of groups)."""

    def run_end(self, group: int, begin: int, end: int) -> int:
        """Return the first of the blocks from `begin` to before `end` that is not held, `end` if all are."""

    def last_missing(self, group: int, begin: int, end: int) -> int:
        """Return the last of the blocks from `begin` to before `end` that is not held, -1 if all are."""

    def last_held(self, group: int, begin: int, end: int) -> int:
        """Return the last of the blocks from `begin` to before `end` that is held, -1 if none is."""


def plain(groups: Sequence[Group]) -> bool:
    """Whether all blocks of a prefix are needed and nothing else, so that whoever holds one can supply any shorter one."""
    return all(group.kind == "full" for group in groups) and len(groups) <= 1


def unit(groups: Sequence[Group]) -> int:
    """Return how many tokens each key of a chain stands for: every group's block ends at a key."""
    return math.gcd(*(group.block_size for group in groups))


def step(groups: Sequence[Group]) -> int:
    """Return what the length of a supplied prefix is a multiple of, in tokens: there a block of every group ends."""
    return math.lcm(*(group.block_size for group in groups))


def flaw(groups: Sequence[Group], tokens: int) -> str:
    """Return what is wrong with groups that another process describes, whose keys stand for `tokens` tokens; "" if nothing."""
    if len(groups) > GROUPS_MAX:
        return f"{len(groups)} groups"
    if any(group.block_size < 1 or (group.window < 1 and group.kind in ("window", "chunk")) for group in groups):
        return "a group with a block size or a window of 0"
    if groups and unit(groups) != tokens:
        return f"groups whose keys stand for {unit(groups)} tokens, not {tokens}"
    return ""


def import_bytes(groups: Sequence[Group]) -> tuple[float, float]:
    """Return the bytes of an import into one rank: those that any long one has, and those for each token of it."""
    return sum(group.import_bytes for group in groups), sum(group.token_bytes for group in groups)


def needed(group: Group, begin: int, end: int) -> range:
    """Return the blocks of `group` with which a prefix of `begin` tokens grows to `end`; both multiples of `step`."""
    return range(max(group.first_needed(end), begin // group.block_size), end // group.block_size)


def supplied(groups: Sequence[Group], holder: Holder, begin: int, end: int) -> int:
    """Return to how many tokens, at most `end`, a prefix of `begin` tokens that one has grows by what `holder` holds.

    `begin` if by none. It is the longest length at which every group has the blocks that it needs there: groups that need all
    blocks bound it first; then each missing block of another group takes it down to where that block is not needed yet. What
    takes more than _TRIES_MAX look-ups is a miss.
    """
    size = step(groups)
    length = end // size * size
    for number, group in enumerate(groups):
        if group.kind == "full" and length > begin:
            run = holder.run_end(number, begin // group.block_size, length // group.block_size)
            length = run * group.block_size // size * size
    others = [(number, group) for number, group in enumerate(groups) if group.kind != "full"]
    checked = tries = 0
    while length > begin and checked < len(others):
        tries += 1
        if tries > _TRIES_MAX:
            return begin
        number, group = others[checked]
        blocks = needed(group, begin, length)
        missing = holder.last_missing(number, blocks.start, blocks.stop)
        checked += 1
        if missing >= 0:
            held = holder.last_held(number, begin // group.block_size, missing)
            length = _longest_without(group, missing, held, size)
            checked = 0
    return max(length, begin)


def _longest_without(group: Group, missing: int, held: int, size: int) -> int:
    """Return the longest length, a multiple of `size`, at which `group` may have what it needs if it lacks block `missing`.

    `held` is the last block before that which is not missing. A block that is needed at some length is needed from its own
    end on, and the last block before a length always is, but where a chunk begins: there no block is.
    """
    length = (held + 1) * group.block_size // size * size
    if group.kind == "chunk":
        every = math.lcm(group.window, size)
        return max(length, missing * group.block_size // every * every)
    return length
