"""The index of block holders by itself: time of a look-up, memory of a key, changes a second.

    python -m bench.holder_index

Each holder has the first part of the chain that is looked up, of a length of its own, one of eight, and blocks of its own.
"""

import argparse
import random
import statistics
import time
import tracemalloc
from collections.abc import Sequence

from gateway.block_registry.holder_index import HolderIndex
from transport.keys import Keys, chain_keys, root_key

BLOCK_TOKENS = 16
LENGTHS = (1, 40, 512, 900, 2048, 4000, 7000, 8192)
"""Blocks of the chain that holders have."""
MILLION = 1_000_000


def keys_of(seed: str, blocks: int) -> Keys:
    """Return the keys of a chain of blocks."""
    return chain_keys(root_key(seed.encode().ljust(16)), range(blocks), 1)


def look_ups(holders: int, tokens: Sequence[int], rounds: int) -> list[float]:
    """Return the median microseconds of a look-up of each length among `holders`."""
    index, dice = HolderIndex(), random.Random(holders)
    chain = keys_of("chain", max(LENGTHS))
    lows = chain[:, 0].tolist()
    for number in range(holders):
        place = index.take_place()
        index.add(place, lows[: dice.choice(LENGTHS)])
        index.add(place, keys_of(f"own {number}", 256)[:, 0].tolist())
    found = []
    for length in tokens:
        words, everybody = chain[: length // BLOCK_TOKENS].reshape(-1).data, (1 << holders) - 1
        taken = []
        for _ in range(rounds):
            begun = time.perf_counter()
            index.lengths(words, everybody)
            taken.append(time.perf_counter() - begun)
        found.append(statistics.median(taken) * 1e6)
    return found


def memory_and_changes(holders: int, each: int) -> tuple[float, float]:
    """Return the bytes of a key, where one in four has a second holder, and the changes taken in a second."""
    tracemalloc.start()
    index, before = HolderIndex(), tracemalloc.get_traced_memory()[0]
    previous: list[int] = []
    changes, seconds = 0, 0.0
    for number in range(holders):
        place, lows = index.take_place(), keys_of(f"own {number}", each)[:, 0].tolist()
        lows[: each // 4] = previous[-(each // 4) :] or lows[: each // 4]
        index.add(place, lows)
        previous = lows
    kept = len(index)
    size = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    for number in range(holders):
        lows = keys_of(f"own {number}", each)[each // 4 :, 0].tolist()
        begun = time.perf_counter()
        index.remove(number, lows)
        index.add(number, lows)
        seconds += time.perf_counter() - begun
        changes += 2 * len(lows)
    return size / kept, changes / seconds


def main() -> None:
    """Read the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--holders", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 131072])
    parser.add_argument("--rounds", type=int, default=201)
    given = parser.parse_args()
    print("microseconds of a look-up, median")
    print(f"{'holders':>8} " + " ".join(f"{length:>8}" for length in given.tokens))
    for holders in given.holders:
        found = look_ups(holders, given.tokens, given.rounds)
        print(f"{holders:8} " + " ".join(f"{each:8.1f}" for each in found), flush=True)
    size, rate = memory_and_changes(64, 16_384)
    print(f"{size:.0f} bytes a key, {size * MILLION / 2**20:.0f} MiB a million; {rate / MILLION:.1f} M changes a second")


if __name__ == "__main__":
    main()
