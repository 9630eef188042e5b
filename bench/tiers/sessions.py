"""How many sessions one replica keeps before it computes their prompts again, by tier: real vLLM on this machine.

After NeuroKV's "crash test". All memories are emptied, then each session sends its prompt; once all have, each sends it again
with some more tokens, as the next turn of a chat does. Sessions grow in number until more than AGAIN_MAX of what they had sent
is computed again. Tokens are counted, not time, so several replicas may be measured beside each other, also on one GPU.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from bench.field.flags import write_chat_model
from bench.machine import StartFailed
from bench.tiers.restore import WORDS, Served
from transport.table.directory import TableDirectory
from transport.table.tiers import host_memory_of

AGAIN_MAX = 0.05
TURN_TOKENS = 8
BLOCK_TOKENS = 32
GROWTH = 1.3
SESSIONS_MAX = 512
FIRST_SHARE = 0.6
"""Of the sessions that KV cache and host memory have room for: where the search begins if no number is told."""
OPEN_SECONDS_MAX = 60.0
OPEN_TOKENS = 512
WAY_DOWN = "32MiB"
"""Host memory where the disk is measured: blocks reach it by that way."""
GPU_WAY_DOWN, GPU_STAGING_BYTES = "1GiB", 2 << 30
OWN = "replica-0"


@dataclass(frozen=True, slots=True)
class Arm:
    """`flags` for a tier of `size` bytes; `stores`: how many of disk and vault there are; `codec`: that of host memory."""

    name: str
    flags: Callable[[int, Path], list[str]]
    stores: int = 0
    codec: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """`kept` sessions were kept, `more` were not: this share of their prompts was computed again. Or why it is `skipped`."""

    tier: str
    kept: int = 0
    more: int = 0
    again: float = 0.0
    room: int = 0
    """Sessions that KV cache and host memory have room for."""
    skipped: str = ""

    def row(self) -> str:
        """Return a row of the table."""
        if self.skipped:
            return f"| {self.tier} | not measured: {self.skipped} | | |"
        return f"| {self.tier} | {self.kept} | {self.more} | {100 * self.again:.0f} % |"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens of a session, bytes of the KV cache and of the tier; `model` "" is the default model, or a generated one."""

    model: str
    tokens: int
    kv_bytes: int
    tier_bytes: int
    gpu: bool = False
    vllm_args: tuple[str, ...] = ()


class Skipped(Exception):
    """An arm cannot be measured here; the message says why."""


def _on_disk(*more: str) -> Callable[[int, Path], list[str]]:
    return lambda size, home: ["--host-memory", WAY_DOWN, "--disk", str(home / "disk"), "--disk-bytes", str(size), *more]


def _coded(codec: str) -> Arm:
    flags = ("--lossy", codec)
    return Arm(f"host memory, {codec}", lambda size, _home: ["--host-memory", str(size), *flags], codec=codec)


ARMS = (
    Arm("no tier", lambda _size, _home: ["--host-memory", "0"]),
    Arm("host memory", lambda size, _home: ["--host-memory", str(size)]),
    _coded("int8"),
    _coded("rot4"),
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


def most_sessions(share: Callable[[int], float], first: int, *, down: bool = False) -> tuple[int, int, float]:
    """Return how many sessions were kept, the next larger number tried, and the `share` that was computed again then.

    `first` sessions are tried first; `down`: if that is too many, fewer. Raises RuntimeError if it is too many, or none is.
    """
    kept, tried = 0, first
    failed: tuple[int, float] | None = None
    while tried <= SESSIONS_MAX:
        again = share(tried)
        if again > AGAIN_MAX and not kept and tried > 1:
            if not down:
                raise RuntimeError(f"not even {first} sessions are kept: begin with fewer")
            failed, tried = (tried, again), max(1, min(tried - 1, round(tried / GROWTH)))
            continue
        if again > AGAIN_MAX:
            return kept, tried, again
        if failed is not None:
            return tried, *failed
        kept, tried = tried, max(tried + 1, round(tried * GROWTH))
    raise RuntimeError(f"{kept} sessions are kept, and more are not tried: take a smaller tier or longer prompts")


def room(served: Served, sizes: Sizes, arm: Arm) -> int:
    """Return how many sessions KV cache and host memory have room for. Raises Skipped if that is not coded as it should be."""
    tables = TableDirectory(served.table_dir)
    try:
        found = tables.tables()
        below = found.get(host_memory_of(OWN))
        coded = below.memories[0].coded if below is not None and below.memories else None
        if arm.codec and (coded is None or coded.codec != arm.codec):
            raise Skipped(f"host memory does not code by {arm.codec} here")
        blocks = found[OWN].num_blocks + (below.num_blocks if below is not None else 0)
        return max(1, int(blocks * found[OWN].block_size) // sizes.tokens)
    finally:
        tables.close()


def wait_until_open(served: Served, prompts: Callable[[int], list[int]]) -> None:
    """Wait until something was stored in host memory: what a GPU stores in it needs it pinned. Raises TimeoutError."""
    tables, until = TableDirectory(served.table_dir), time.monotonic() + OPEN_SECONDS_MAX
    try:
        while not tables.tables()[host_memory_of(OWN)].counters()["published_blocks"]:
            if time.monotonic() > until:
                raise TimeoutError(f"nothing was stored in host memory in {OPEN_SECONDS_MAX:g} s")
            served.seconds(prompts(OPEN_TOKENS))
            time.sleep(0.2)
    finally:
        tables.close()


def started(arm: Arm, sizes: Sizes, model: str, home: Path) -> Served:
    """Start a replica with the tier of an arm, in a directory of its own."""
    flags = arm.flags(sizes.tier_bytes, home)
    if sizes.gpu and arm.stores:
        flags = [GPU_WAY_DOWN if flag == WAY_DOWN else flag for flag in flags]
        flags += ["--tier-staging-bytes", str(GPU_STAGING_BYTES)]
    return Served(home, model, flags, stores=arm.stores, kv_bytes=sizes.kv_bytes, dtype="bfloat16", vllm_args=sizes.vllm_args)


def measured(served: Served, arm: Arm, sizes: Sizes, first: int) -> Found:
    """Search for an arm's number of sessions."""
    numbers = random.Random(f"{os.getpid()} {arm.name}")

    def prompts(count: int) -> list[int]:
        return [numbers.randrange(1000, WORDS) for _ in range(count)]

    def share(sessions: int) -> float:
        found = computed_again(served, sessions, sizes.tokens, prompts)
        print(f"  {arm.name}: {sessions} sessions, {100 * found:.0f} % computed again", file=sys.stderr, flush=True)
        return found

    try:
        holds = room(served, sizes, arm)
        if sizes.gpu and arm.name != ARMS[0].name:
            wait_until_open(served, prompts)
        begin = first or max(1, round(FIRST_SHARE * holds))
        return Found(arm.name, *most_sessions(share, begin, down=not first), room=holds)
    except (Skipped, RuntimeError, TimeoutError, httpx.HTTPError) as error:
        return Found(arm.name, skipped=str(error))


def _together(
    arms: Sequence[Arm], sizes: Sizes, model: str, first: int, turns: Path | None, at: Path | None
) -> Iterator[Found]:
    """Measure arms beside each other, once all serve and, with `turns`, no other bench measures."""
    with ExitStack() as stack:
        serving: list[tuple[Arm, Served]] = []
        for arm in arms:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peerkv-bench-sessions-", dir=at)))
            serving.append((arm, started(arm, sizes, model, home)))
            stack.callback(serving[-1][1].end)
        for arm, served in list(serving):
            try:
                served.wait()
            except StartFailed as error:
                serving.remove((arm, served))
                yield Found(arm.name, skipped=str(error).replace("\n", " ")[-500:])
        print(f"  serving: {', '.join(arm.name for arm, _ in serving)}", file=sys.stderr, flush=True)
        if turns is not None:
            fcntl.flock(stack.enter_context(turns.open("a")), fcntl.LOCK_EX)
        pool = stack.enter_context(ThreadPoolExecutor(max(1, len(serving))))
        yield from pool.map(lambda each: measured(each[1], each[0], sizes, first), serving)


def run(
    sizes: Sizes,
    directory: Path | None,
    names: Sequence[str] = (),
    first: int = 1,
    *,
    beside: int = 1,
    turns: Path | None = None,
    file: Path | None = None,
) -> None:
    """Measure and print a row for each arm, or for those of these names, `beside` at once; all rows go to `file` as well.

    `first`: sessions to begin with; 0: by the room that there is.
    """
    about = f"KV cache {sizes.kv_bytes >> 20} MiB, tier {sizes.tier_bytes >> 20} MiB, bfloat16"
    print(f"sessions of {sizes.tokens} tokens, {about}{', 8B shape, dummy weights' if sizes.gpu else ''}", flush=True)
    print("| tier | sessions kept | not kept | computed again then |\n|---|---|---|---|", flush=True)
    arms = [arm for arm in ARMS if not names or arm.name in names]
    found: list[Found] = []
    with ExitStack() as stack:
        model = sizes.model
        if sizes.gpu and not model:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="peerkv-bench-model-", dir=directory))
            model = str(write_chat_model(Path(folder)))
        for begin in range(0, len(arms), beside):
            for each in _together(arms[begin : begin + beside], sizes, model, first, turns, directory):
                found.append(each)
                print(each.row(), flush=True)
                if file is not None:
                    file.write_text(json.dumps({"sizes": asdict(sizes), "rows": [asdict(row) for row in found]}, indent=1))
