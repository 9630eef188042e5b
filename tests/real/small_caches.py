"""Replicas whose KV cache holds little more than one prompt, and what the tiers below it give back."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.real.fleet import Fleet
from tests.real.prompts import Words
from transport.keys import chain_keys, root_key
from transport.table.group_look_up import GroupChain
from transport.table.reader import TableReader

BLOCK = 32
LENGTH = 300
WHOLE = (LENGTH - 1) // BLOCK * BLOCK
SMALL = ("--kv-cache-memory-bytes", "33554432", "--max-model-len", "512")  # 21 blocks, 672 tokens


def push_out(fleet: Fleet, words: Words, replica: str, key: str = "") -> None:
    """Make a replica give up every block that it holds and that is not pinned, by three other prompts."""
    for _ in range(3):
        fleet.answer(words.ids(8 * BLOCK - 2), replica=replica, key=key, max_tokens=1)


def stores(fleet: Fleet) -> dict[str, dict]:
    """What /kv/stats says of disk and vault, by name."""
    return {store["name"]: store for store in fleet.stats()["tiers"]["stores"]}


def settle(fleet: Fleet) -> None:
    """Wait until all that was stored in host memory is on the disk and in the vault: figures come once a second."""

    def written() -> list[int]:
        return [store["stored_frames"] for store in stores(fleet).values()]

    before: list[int] = []
    while (now := written()) != before:
        before = now
        time.sleep(1.5)


@contextmanager
def restoring(fleet: Fleet, replica: str, source: str, whole: int = WHOLE) -> Iterator[None]:
    """The one request inside restores so many tokens from `source`, and computes the rest.

    The canaries that the gateway sends after it replaced a replica may be counted too.
    """
    before = fleet.replica_stats(replica)["tokens"]
    yield
    after = fleet.replica_stats(replica)["tokens"]
    moved = {name: after[name] - before[name] for name in after}
    canaries = moved["prompt"] - LENGTH
    assert whole <= moved[source] <= whole + canaries, moved
    assert LENGTH - whole <= moved["computed"] <= LENGTH - whole + canaries, moved


def chain_of(table: TableReader, ids: list[int]) -> GroupChain:
    """The chain of a prompt without a salt."""
    keys = chain_keys(root_key(table.fingerprint), ids, table.block_size, table.hash_name)
    return GroupChain(table.groups, keys)
