"""How many sessions one replica keeps before it computes their prompts again, by tier: real vLLM on this machine.

After NeuroKV's "crash test". All memories are emptied, then each session sends its prompt; once all have, each sends it again
with some more tokens, as the next turn of a chat does. Sessions grow in number until more than AGAIN_MAX of what they had sent
is computed again. Tokens are counted, not time.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.tiers.restore import WORDS, Served

AGAIN_MAX = 0.05
TURN_TOKENS = 8
BLOCK_TOKENS = 32
GROWTH = 1.3
SESSIONS_MAX = 512
WAY_DOWN = "32MiB"
"""Host memory where the disk is measured: blocks reach it by that way."""


@dataclass(frozen=True, slots=True)
class Arm:
    """`flags` for a tier of `size` bytes; `stores`: how many of disk and vault there are."""

    name: str
    flags: Callable[[int, Path], list[str]]
    stores: int = 0


def _on_disk(*more: str) -> Callable[[int, Path], list[str]]:
    return lambda size, home: ["--host-memory", WAY_DOWN, "--disk", str(home / "disk"), "--disk-bytes", str(size), *more]


ARMS = (
    Arm("no tier", lambda _size, _home: ["--host-memory", "0"]),
    Arm("host memory", lambda size, _home: ["--host-memory", str(size)]),
    Arm("host memory, int8", lambda size, _home: ["--host-memory", str(size), "--lossy", "int8"]),
    Arm("host memory, rot4", lambda size, _home: ["--host-memory", str(size), "--lossy", "rot4"]),
    Arm("disk, raw-z", _on_disk(), stores=1),
    Arm("disk, int8", _on_disk("--lossy", "int8"), stores=1),
    Arm("disk, rot4", _on_disk("--lossy", "rot4"), stores=1),
)


def computed_again(served: Served, sessions: int, tokens: int, prompts: Callable[[int], list[int]]) -> float:
    """Return the share of the sessions' first prompts, of `tokens` each, that is computed again in their second turns."""
    served.client.post("/kv/flush").raise_for_status()  # else a tier keeps sessions of before that were asked for twice
    first = [prompts(tokens) for _ in range(sessions)]
    for ids in first:
        served.seconds(ids)
        served.settle()  # sessions come one after the other, slowly
    again = 0
    for ids in first:
        _, moved = served.seconds(ids + prompts(TURN_TOKENS))
        again += max(0, moved["computed"] - TURN_TOKENS - tokens % BLOCK_TOKENS)
    return again / (sessions * tokens)


def most_sessions(served: Served, tokens: int, prompts: Callable[[int], list[int]], first: int) -> tuple[int, int, float]:
    """Return how many sessions were kept, the next larger number tried, and the share that was computed again then.

    `first` sessions are tried first. Raises RuntimeError if that is too many, or none is.
    """
    kept, tried = 0, first
    while tried <= SESSIONS_MAX:
        share = computed_again(served, tried, tokens, prompts)
        print(f"  {tried} sessions: {100 * share:.0f} % computed again", file=sys.stderr, flush=True)
        if share > AGAIN_MAX and not kept and first > 1:
            raise RuntimeError(f"not even {first} sessions are kept: begin with fewer")
        if share > AGAIN_MAX:
            return kept, tried, share
        kept, tried = tried, max(tried + 1, round(tried * GROWTH))
    raise RuntimeError(f"{kept} sessions are kept, and more are not tried: take a smaller tier or longer prompts")


def run(
    model: str, tokens: int, kv_bytes: int, tier_bytes: int, directory: Path | None, names: Sequence[str] = (), first: int = 1
) -> None:
    """Measure and print a row for each arm, or for those of these names, beginning with `first` sessions."""
    print(f"sessions of {tokens} tokens, KV cache {kv_bytes >> 20} MiB, tier {tier_bytes >> 20} MiB, bfloat16", flush=True)
    print("| tier | sessions kept | not kept | computed again then |\n|---|---|---|---|", flush=True)
    numbers = random.Random(os.getpid())
    for arm in (arm for arm in ARMS if not names or arm.name in names):
        with ExitStack() as stack:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peerkv-bench-sessions-", dir=directory)))
            served = Served(home, model, arm.flags(tier_bytes, home), stores=arm.stores, kv_bytes=kv_bytes, dtype="bfloat16")
            stack.callback(served.end)
            served.wait()
            kept, more, share = most_sessions(
                served, tokens, lambda count: [numbers.randrange(1000, WORDS) for _ in range(count)], first
            )
            print(f"| {arm.name} | {kept} | {more} | {100 * share:.0f} % |", flush=True)
