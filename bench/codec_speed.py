"""How fast frames are written and read, by codec: `python -m bench.codec_speed`.

Blocks of 16 tokens of an 8B shape (32 layers, 8 heads of 128, bfloat16, 2 MiB), normal numbers, in a pool of threads. GB are
of the block's own bytes, checksums are included; medians of rounds in which codecs take turns. CPU seconds a GB tell what a
core can do even where others work beside it.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from transport.frames.codec import Block, Codec
from transport.frames.codecs import NAMES, named
from transport.frames.frame import read_into, write
from transport.frames.layouts import attention
from transport.frames.shape import Bytes, Number

SHAPE = attention(32, 8, 16, 128, Number.BFLOAT16)
FINGERPRINT = KEY = bytes(16)
POSITION = 64
"""Not the beginning of a sequence, whose first tokens some codecs keep raw."""


def blocks(count: int) -> list[Block]:
    """Return different blocks."""
    source = np.random.default_rng(0)
    numbers = (source.standard_normal(SHAPE.nbytes // 2, np.float32).view(np.uint32) >> 16 for _ in range(count))
    return [Block(SHAPE, each.astype(np.uint16).view(np.uint8), POSITION, 1000) for each in numbers]


def speed(work: Callable[[int], object], count: int, pool: ThreadPoolExecutor) -> tuple[float, float]:
    """Return the GB/s of `work` on `count` blocks by number, and its CPU seconds a GB."""
    begun, used = time.perf_counter(), time.process_time()
    for _ in pool.map(work, range(count)):
        pass
    gigabytes = count * SHAPE.nbytes / 1e9
    return gigabytes / (time.perf_counter() - begun), (time.process_time() - used) / gigabytes


def turn(codec: Codec, given: Sequence[Block], outs: Sequence[Bytes], pool: ThreadPoolExecutor) -> tuple[float, ...]:
    """Return `speed` of writing and of reading, and the share of a block's bytes that its frame has."""
    frames: list[bytes] = [b""] * len(given)

    def encode(number: int) -> None:
        frames[number] = write(codec, given[number], fingerprint=FINGERPRINT, key=KEY)

    def decode(number: int) -> None:
        read_into(outs[number], frames[number], fingerprint=FINGERPRINT, key=KEY, shape=SHAPE)

    costs = (*speed(encode, len(given), pool), *speed(decode, len(given), pool))
    return (*costs, sum(map(len, frames)) / (len(given) * SHAPE.nbytes))


def main() -> None:
    """Read the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="sizes of the pool (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of each turn (default: 8)")
    given = parser.parse_args()
    made = blocks(given.blocks)
    outs = [np.empty(SHAPE.nbytes, np.uint8) for _ in made]
    with ThreadPoolExecutor(1) as pool:
        for name in NAMES:  # compiled, and memory touched
            turn(named(name), made[:1], outs, pool)
    print(f"medians of {given.rounds} rounds (GB/s: least to most); load average {os.getloadavg()[0]:.0f}")
    heads = ("write, GB/s", "CPU s/GB", "read, GB/s", "CPU s/GB", "share of bytes")
    print(f"{'codec':8} {'threads':>7} {heads[0]:>22} {heads[1]:>9} {heads[2]:>22} {heads[3]:>9} {heads[4]:>15}")
    for threads in given.threads:
        with ThreadPoolExecutor(threads) as pool:
            turns = [{name: turn(named(name), made, outs, pool) for name in NAMES} for _ in range(given.rounds)]
        for name in NAMES:
            written, write_cost, read, read_cost, shares = zip(*(each[name] for each in turns), strict=True)
            costs = [f"{statistics.median(cost):9.2f}" for cost in (write_cost, read_cost)]
            print(f"{name:8} {threads:7} {_spread(written):>22} {costs[0]} {_spread(read):>22} {costs[1]} {shares[0]:15.3f}")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
