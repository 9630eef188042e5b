"""Streams whose replica is killed: `python -m bench.continuity --model DIR`.

`peerkv serve` runs two real replicas in float32. Each round starts streams with the openai client, greedy completions and chats
in turn, waits until all of them have begun, kills one replica with SIGKILL, and waits for the streams' ends. Every stream is
compared with the same request undisturbed: text, finish reason, usage, and for completions the ids of the tokens. The wait at
the cut is the longest time between two events of a stream whose replica was killed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from bench.child_process import Started
from bench.machine import end_on_sigterm, free_ports
from engine.fleet import FileFleet

READY_SECONDS_MAX = 300.0
ANSWER_SECONDS_MAX = 300.0
NAME = "continued"
ROUNDS_BETWEEN_TABLES = 5
FORMS = ("completions", "chat")
WORDS = (
    *("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "island", "jasper", "kelp", "lagoon"),
    *("meadow", "nectar", "onyx", "pebble", "quartz", "reed", "sable", "tundra", "umber", "velvet", "willow", "zephyr"),
)


@dataclass
class Stream:
    """What a client got of one stream. Times are seconds."""

    replica: str = ""
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish: str | None = None
    usage: tuple[int, int] | None = None
    error: str = ""
    stream_ids: set[str] = field(default_factory=set)
    came_at: list[float] = field(default_factory=list)

    @property
    def gaps(self) -> list[float]:
        """Between one event and the next."""
        return [after - before for before, after in zip(self.came_at, self.came_at[1:], strict=False)]

    def same_as(self, other: Stream) -> bool:
        """Whether a client could tell no difference."""
        return (self.text, self.ids, self.finish, self.usage, self.error) == (
            *(other.text, other.ids, other.finish, other.usage),
            "",
        ) and len(self.stream_ids) == 1


async def stream(
    client: openai.AsyncOpenAI, form: str, prompt: str, tokens: int, begun: asyncio.Event | None = None, model: str = NAME
) -> Stream:
    """Have one request answered; `begun` is set when some tokens have come."""
    got = Stream()
    common: dict[str, Any] = {"model": model, "max_tokens": tokens, "temperature": 0, "stream": True}
    common |= {"stream_options": {"include_usage": True}, "timeout": ANSWER_SECONDS_MAX}
    if form == "chat":
        raw: Any = await client.chat.completions.with_raw_response.create(
            messages=[{"role": "user", "content": prompt}], **common
        )
    else:
        raw = await client.completions.with_raw_response.create(prompt=prompt, extra_body={"return_token_ids": True}, **common)
    got.replica = raw.headers["x-peerkv-replica"]
    try:
        async for event in raw.parse():
            got.came_at.append(time.perf_counter())
            got.stream_ids.add(event.id)
            if event.usage is not None:
                got.usage = (event.usage.prompt_tokens, event.usage.completion_tokens)
            for choice in event.choices:
                got.text += (choice.delta.content or "") if form == "chat" else choice.text
                got.ids += (getattr(choice, "token_ids", None) or []) if form != "chat" else []
                got.finish = choice.finish_reason or got.finish
            if begun is not None and len(got.came_at) >= 4:
                begun.set()
    except openai.APIError as error:
        got.error = f"{type(error).__name__}: {error}"
    return got


class Fleet:
    """A running `peerkv serve` with two real replicas."""

    def __init__(self, directory: Path, model: str, port: int, host_memory: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.run_dir = directory / "run"
        self._directory = directory
        argv = [sys.executable, "-m", "gateway.cli", "serve", model, "--port", str(port), "--replicas", "2"]
        argv += ["--served-model-name", NAME, "--run-dir", str(self.run_dir), "--log-dir", str(directory / "logs")]
        argv += ["--table-dir", f"/dev/shm/peerkv-continuity-{os.getpid()}"]
        argv += ["--host-memory", host_memory or "0"]
        # On a busy machine checks of health may take long, and nobody is to be killed but by us.
        settings = {"PEERKV_BACKOFF_SECONDS_MAX": "1", "PEERKV_HEALTH_TIMEOUT_SECONDS": "60"}
        self.process = Started([*argv, "--", "--dtype", "float32"], directory / "serve.log", settings)

    def wait(self) -> None:
        """Wait until both replicas serve, and token ids were compared. Raises StartFailed."""
        deadline = time.monotonic() + READY_SECONDS_MAX
        while not self._is_ready():
            self.process.check(time.monotonic() < deadline)
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        try:
            ready = httpx.get(f"{self.url}/ready", timeout=5.0).json()
            parity = httpx.get(f"{self.url}/kv/stats", timeout=5.0).json()["parity"]
        except (httpx.HTTPError, ValueError, KeyError):
            return False
        known = all(parity[kind]["parity"] != "unknown" for kind in FORMS)
        return known and len(ready["replicas"]) == 2 and all(replica["ready"] for replica in ready["replicas"])

    def kill(self, name: str) -> None:
        """End a replica's process as the kernel does when memory is short."""
        found = FileFleet(self.run_dir).snapshot().find(name)
        assert found is not None
        assert found.pid is not None
        os.kill(found.pid, signal.SIGKILL)

    def counters(self) -> dict[str, int]:
        """What the gateway counted of its requests."""
        counted: dict[str, int] = httpx.get(f"{self.url}/kv/stats", timeout=10.0).json()["gateway"]
        return counted


async def cut_round(
    fleet: Fleet, client: openai.AsyncOpenAI, streams: int, tokens: int, dice: random.Random
) -> list[tuple[str, Stream, Stream, bool]]:
    """One replica killed under so many streams; (form, disturbed, undisturbed, whether it was cut) of each."""
    requests = [(FORMS[number % len(FORMS)], " ".join(dice.choices(WORDS, k=60))) for number in range(streams)]
    dice.shuffle(requests)
    begun = [asyncio.Event() for _ in requests]
    tasks = [
        asyncio.create_task(stream(client, form, prompt, tokens, event))
        for (form, prompt), event in zip(requests, begun, strict=True)
    ]
    async with asyncio.timeout(ANSWER_SECONDS_MAX):
        await asyncio.gather(*(event.wait() for event in begun))
    await asyncio.sleep(dice.random() * 0.5)
    killed = f"replica-{dice.randrange(2)}"
    killed_at = time.perf_counter()
    fleet.kill(killed)
    disturbed = await asyncio.gather(*tasks)
    cut = [each.replica == killed and each.came_at[-1] > killed_at for each in disturbed]
    await asyncio.to_thread(fleet.wait)
    patient = client.with_options(max_retries=3)
    wholes = await asyncio.gather(*(stream(patient, form, prompt, tokens) for form, prompt in requests))
    return [
        (form, each, whole, was_cut) for (form, _), each, whole, was_cut in zip(requests, disturbed, wholes, cut, strict=True)
    ]


def row(name: str, found: Sequence[tuple[str, Stream, Stream, bool]]) -> str:
    """A line of the table."""
    cut = [(disturbed, whole) for _, disturbed, whole, was_cut in found if was_cut]
    same = sum(disturbed.same_as(whole) for _, disturbed, whole, _ in found)
    waits = sorted(max(disturbed.gaps) for disturbed, _ in cut) or [0.0]
    usual = statistics.median([gap for _, _, whole, _ in found for gap in whole.gaps])
    median, most = statistics.median(waits), waits[-1]
    return f"| {name} | {len(found)} | {len(cut)} | {same} | {median:.2f} | {most:.2f} | {usual:.3f} |"


async def measure(given: argparse.Namespace, fleet: Fleet) -> bool:
    """Print the table; return whether every stream was as it should be."""
    dice = random.Random(given.seed)
    found: list[tuple[str, Stream, Stream, bool]] = []
    async with openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="unused", max_retries=0) as client:
        for number in range(given.kills):
            some = await cut_round(fleet, client, given.streams, given.tokens, dice)
            found += some
            for form, disturbed, whole, was_cut in some:
                if not disturbed.same_as(whole):
                    print(
                        f"round {number}: a stream of {form} ({was_cut=}) differs: {disturbed!r}\nwhole: {whole!r}", flush=True
                    )
            print(f"killed {number + 1} of {given.kills}, {sum(each[3] for each in some)} streams cut", flush=True)
            if number + 1 < given.kills and (number + 1) % ROUNDS_BETWEEN_TABLES == 0:
                show(found)
    show(found)
    print({name: count for name, count in fleet.counters().items() if "stream" in name or "lost" in name})
    return all(disturbed.same_as(whole) for _, disturbed, whole, _ in found)


def show(found: Sequence[tuple[str, Stream, Stream, bool]]) -> None:
    """Print the table."""
    print("| streams | all | cut | as undisturbed | s at the cut, median | most | s between events, undisturbed |")
    print("|---|---|---|---|---|---|---|")
    for form in FORMS:
        if some := [each for each in found if each[0] == form]:  # one stream at a time is of one form
            print(row(form, some), flush=True)


def main() -> int:
    """Measure, and return 1 if a stream was not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m bench.continuity", description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="directory of the model")
    parser.add_argument("--kills", type=int, default=30, metavar="N", help="how often a replica is killed (default: 30)")
    parser.add_argument("--streams", type=int, default=6, metavar="N", help="streams at once (default: 6)")
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="tokens of each (default: 96)")
    parser.add_argument("--host-memory", default="", metavar="SIZE", help="as of peerkv serve, such as 1GiB (default: none)")
    parser.add_argument("--port", type=int, metavar="N", help="port of the gateway (default: a free one)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of prompts and of the moments (default: 1)")
    given = parser.parse_args()
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="peerkv-continuity-") as name:
        fleet = Fleet(Path(name), given.model, given.port or free_ports(1)[0], given.host_memory)
        try:
            fleet.wait()
            return 0 if asyncio.run(measure(given, fleet)) else 1
        finally:
            fleet.process.end()


if __name__ == "__main__":
    sys.exit(main())
