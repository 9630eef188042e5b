"""What digests gain in the case that they are for: `python -m bench.taken_out --model DIR`.

A text that was never seen comes twice, once with ids under digests and once without, in turn; the CPU time of its second coming
is printed, the median of some texts.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from gateway.prompts.tokenizer.id_cache import IdCache
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService

WORDS = (200, 3_000, 35_000)
TEXTS = 12


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.taken_out", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory with the tokenizer")
    given = parser.parse_args()
    get = IdCache.get
    print("| characters | with digests, µs | without, µs |\n|---|---|---|")
    for words in WORDS:
        characters = 0
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for seed in range(2 * TEXTS):
            digests = seed % 2 == 0
            IdCache.get = get if digests else _none  # type: ignore[method-assign, assignment]
            service = TokenService(TokenizerSource(str(given.model)))
            if not (state := service.load()).loaded:
                print(state.reason, file=sys.stderr)
                return 1
            text = " ".join(random.Random(seed).choices(_vocabulary(), k=words))
            characters = len(text)
            service.encode(text)
            seconds[digests].append(_cpu_seconds(partial(service.encode, text)))
        print(f"| {characters:,} | {median(seconds[True]) * 1e6:,.0f} | {median(seconds[False]) * 1e6:,.0f} |", flush=True)
    return 0


def _none(cache: IdCache, keys: Sequence[bytes]) -> list[None]:
    return [None] * len(keys)


def _vocabulary() -> list[str]:
    return (Path(__file__).parents[2] / "README.md").read_text().split()


def _cpu_seconds(call: Callable[[], object]) -> float:
    before = time.thread_time()
    call()
    return time.thread_time() - before


if __name__ == "__main__":
    sys.exit(main())
