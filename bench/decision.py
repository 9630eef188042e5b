"""What a decision costs the gateway, from body to plan, by prompt length, number of replicas and what was seen before.

    python -m bench.decision --model DIR            a table of milliseconds
    python -m bench.decision --model DIR --memory   the memory of a gateway that steers a million blocks

DIR contains the model's tokenizer.json. The planner, the tables and the tokenizer are real. The replicas are tables without an
engine: one holds the whole prompt, one the first half, the others hold other prompts.
"""

import argparse
import asyncio
import gc
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from engine.fleet import FleetSnapshot, Replica, ReplicaState
from gateway.block_registry.fleet_watch import HOLD_SECONDS
from gateway.planner.planner import Planner
from gateway.prompts.parity import KindVerdict, Parity, ParityVerdict
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService
from gateway.settings import load
from gateway.tenants.tenants import ANONYMOUS
from gateway.token_ids import TokenIds
from transport.fingerprint import fingerprint_digest
from transport.keys import chain_keys, root_key
from transport.table.directory import TableDirectory
from transport.table.layout import Description
from transport.table.writer import TableWriter

BLOCK_SIZE = 16
FIELDS = {"weights": "bench"}
ROOT = root_key(fingerprint_digest(FIELDS))
WORDS = (
    "the",
    "of",
    "steering",
    "prefix",
    "a",
    "holds",
    "Block",
    "tables",
    "and",
    "quickly",
    "2026",
    "cache,",
    "replica.",
    "\n",
)


class StandingFleet:
    """Replicas that are always ready."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        ready = (Replica(name, ReplicaState.READY, f"/run/{name}.sock", 1, 0, "", "cuda:0", "") for name in names)
        self._snapshot = FleetSnapshot(1, "model", "model", str(directory), tuple(ready))

    def snapshot(self) -> FleetSnapshot:
        return self._snapshot

    def suspect(self, name: str, *, overdue: bool = False) -> None:
        raise AssertionError(f"{name} is only made up")


@contextmanager
def a_fleet(replicas: int, blocks_each: int, tokens: TokenService) -> Iterator[tuple[Planner, list[TableWriter]]]:
    """Return a planner over the tables of this many replicas, which hold nothing yet."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="peerkv-bench-")))
        names = [f"replica-{number}" for number in range(replicas)]
        about = [Description(name, os.getpid(), "xxh3_128", "cuda_ipc", "ok", FIELDS, ()) for name in names]
        writers = [stack.enter_context(closing(TableWriter(directory, each, BLOCK_SIZE, blocks_each))) for each in about]
        tables = stack.enter_context(closing(TableDirectory(directory, hold_seconds=HOLD_SECONDS)))
        planner = Planner(StandingFleet(directory, names), tables, tokens, load())
        planner.prompts.parity = ParityVerdict(KindVerdict(Parity.EXACT), KindVerdict(Parity.EXACT))
        yield planner, writers


def a_text(seed: object, tokens: int, service: TokenService) -> str:
    """Return a text of about this many tokens."""
    words = random.Random(str(seed)).choices(WORDS, k=tokens)
    ids = len(service.encode(" ".join(words[:500])))
    return " ".join(words[: tokens * min(500, tokens) // ids])


async def milliseconds(planner: Planner, bodies: Iterator[Mapping[str, Any]], rounds: int) -> str:
    """Return the median and the least time of a plan."""
    taken = []
    for body in bodies:
        begun = time.perf_counter()
        await planner.plan("completions", dict(body), ANONYMOUS)
        taken.append(time.perf_counter() - begun)
        if len(taken) == rounds:
            break
    return f"{statistics.median(taken) * 1e3:.2f} ({min(taken) * 1e3:.2f})"


async def row(replicas: int, tokens: int, service: TokenService, rounds: int) -> list[str]:
    """Return the milliseconds of a plan for ids, for new text, for text that continues a known one, and for known text."""
    with a_fleet(replicas, max(64, min(40_000, 2_000_000 // replicas)), service) as (planner, writers):
        text = a_text((replicas, tokens), tokens, service)
        ids = service.encode(text)
        held = chain_keys(ROOT, ids, BLOCK_SIZE)[: writers[0].layout.blocks]
        writers[0].publish(range(len(held)), held)
        if replicas > 1:
            writers[1].publish(range(len(held) // 2), held[: len(held) // 2])
        while planner.registry.keep_up(planner.fleet.now()):
            pass
        given = ids.tolist()
        new = ({"prompt": a_text((replicas, tokens, turn), tokens, service)} for turn in range(rounds))
        turns = ({"prompt": text + f"\nQuestion {turn}: {a_text(turn, 200, service)}"} for turn in range(rounds))
        await milliseconds(planner, iter([{"prompt": text}] * 3), 3)
        cases = (iter([{"prompt": given}] * rounds), new, turns, iter([{"prompt": text}] * rounds))
        return [await milliseconds(planner, bodies, rounds) for bodies in cases]


async def times(service: TokenService, lengths: Sequence[int], fleets: Sequence[int], rounds: int) -> None:
    """Print the table."""
    print(f"milliseconds, median and (least) of {rounds} plans")
    print(f"{'replicas':>8} {'tokens':>8} {'ids given':>16} {'new text':>16} {'next turn':>16} {'seen text':>16}")
    for replicas in fleets:
        for tokens in lengths:
            found = await row(replicas, tokens, service, rounds)
            print(f"{replicas:8} {tokens:8} " + " ".join(f"{each:>16}" for each in found), flush=True)


def megabytes() -> dict[str, float]:
    """Return this process's resident memory: its own, and what it shares with the replicas."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    words = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {name: int(kilobytes) / 1024 for name, kilobytes in words.items()}


async def memory(service: TokenService, blocks: int, replicas: int) -> None:
    """Print the memory of a gateway that was asked once for each prompt whose blocks its replicas hold."""
    prompt_tokens = 8192 * BLOCK_SIZE
    before = megabytes()
    with a_fleet(replicas, -(-blocks // replicas), service) as (planner, writers):
        for number in range(blocks * BLOCK_SIZE // prompt_tokens):
            ids = TokenIds.of(random.Random(number).choices(range(1000, 40_000), k=prompt_tokens))
            writer, first = writers[number % replicas], number // replicas * 8192
            keys = chain_keys(ROOT, ids, BLOCK_SIZE)[: writer.layout.blocks - first]
            writer.publish(range(first, first + len(keys)), keys)
            await planner.plan("completions", {"prompt": ids.tolist()}, ANONYMOUS)
        held = sum(table.cached_blocks() for table in planner.fleet.now().tables.values())
        gc.collect()
        after = megabytes()
        print(f"{held:,} blocks in {replicas} tables, each prompt of {prompt_tokens:,} tokens asked for once")
        print(f"  its own memory: {after['RssAnon']:.0f} MB, of which {before['RssAnon']:.0f} before the first request")
        print(f"  shared with the replicas: {after['RssShmem']:.0f} MB of tables")


def main() -> None:
    """Read the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="directory with tokenizer.json")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--blocks", type=int, default=1_000_000, help="for --memory")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536, 131072], help="lengths of prompts")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 8, 64, 1024], help="numbers of replicas")
    parser.add_argument("--rounds", type=int, default=9, help="plans for each figure")
    given = parser.parse_args()
    service = TokenService(TokenizerSource(str(given.model)))
    if not service.load().loaded:
        sys.exit(service.state.reason)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if given.memory:
        asyncio.run(memory(service, given.blocks, 8))
    else:
        asyncio.run(times(service, given.tokens, given.replicas, given.rounds))


if __name__ == "__main__":
    main()
