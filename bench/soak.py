"""`python -m bench.soak [--minutes 10]`: many connections and slow readers, while replicas die and settings are read again.

The gateway, its supervisor and two replicas are processes as `peerkv serve` runs them; in the place of vLLM's server stands
`tests/fake_engine.py`, with a core of its own that makes the steps and writes the block table. Printed each minute: what
clients got, and what the gateway and the host process hold. It fails if that grew from the second third to the last, or if a
request got anything but an answer or a clear error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import aiohttp

from bench.faults import REPLICAS, Gateway, Outcome, running, until

REQUEST_EVERY_SECONDS = 10.0
"""Each connection's requests are so far apart, on average."""
TOKENS, TOKEN_SECONDS = 24, 0.02
SLOW_TOKENS, SLOW_READ_BYTES, SLOW_READ_SECONDS = 4000, 512, 0.25
"""A slow reader's stream is far longer than the sockets on its way hold, and is given up before its end."""
SLOW_READER_SECONDS = 60.0
KILL_EVERY_SECONDS, RELOAD_EVERY_SECONDS = 30.0, 7.0
SAMPLE_SECONDS = 2.0
MEMORY_GROWTH_MAX, DESCRIPTORS_GROWTH_MAX, SHARED_GROWTH_MAX = 0.05, 16, 0.01
PROMPTS = 200


@dataclass(frozen=True)
class Sample:
    """What is held at one moment: resident bytes and descriptors of gateway and host process, bytes of block tables."""

    gateway_bytes: int
    gateway_descriptors: int
    host_bytes: int
    host_descriptors: int
    shared_bytes: int


@dataclass
class Tally:
    """What clients got, by word."""

    got: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    reloads: int = 0

    def wrong(self) -> int:
        """How many got neither an answer nor an error that says what it is."""
        return sum(count for word, count in self.got.items() if word.startswith("wrong"))


def held(gateway: Gateway, host: int) -> Sample:
    def of(pid: int) -> tuple[int, int]:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return resident, len(os.listdir(f"/proc/{pid}/fd"))

    shared = 0
    for path in (gateway.directory / "table").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a replica that ends takes its table away
            shared += path.stat().st_size
    return Sample(*of(gateway.pid), *of(host), shared)


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def host_of(pid: int) -> int:
    """The process that owns the replicas."""
    for child in children(pid):
        if b"engine.host_process" in Path(f"/proc/{child}/cmdline").read_bytes():
            return child
    raise RuntimeError("the gateway has no host process")


async def client(gateway: Gateway, number: int, tally: Tally) -> None:
    """One connection that is kept: a stream now and then, mostly of prompts that others send too."""
    chance = random.Random(number)
    await asyncio.sleep(chance.uniform(0, REQUEST_EVERY_SECONDS))
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        while True:
            prompt = f"document {chance.randrange(PROMPTS)} " * 40 + f"question {chance.random()}"
            body = {"prompt": prompt, "max_tokens": TOKENS, "stream": True, "temperature": 0}
            body["fake"] = {"token_delay": TOKEN_SECONDS}
            tally.got[await streamed(session, gateway.url, body)] += 1
            await asyncio.sleep(chance.expovariate(1 / REQUEST_EVERY_SECONDS))


async def streamed(session: aiohttp.ClientSession, url: str, body: object) -> str:
    """Ask for a stream; return a word for what came."""
    try:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            content = await answer.read()
            if answer.status != 200:
                return f"error {answer.status} {json.loads(content)['error']['code']}"
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
        return f"wrong: {type(error).__name__}"
    events = [line.removeprefix(b"data: ") for line in content.split(b"\n\n") if line.startswith(b"data: ")]
    if not events:
        return "wrong: no events"
    told = [json.loads(each) for each in events if each != b"[DONE]"]
    failed = next((each for each in told if "error" in each), None)
    if failed is not None:
        return f"error event {failed['error']['code']}"
    if events[-1] != b"[DONE]":
        return "wrong: no end"
    words = "".join(each["choices"][0]["text"] for each in told if each["choices"])
    return "answer" if words == "".join(f"w{each} " for each in range(TOKENS)) else "wrong: other words"


async def slow_reader(gateway: Gateway, number: int) -> None:
    """Reads a long stream a little at a time, gives it up in the middle, and begins anew."""
    chance = random.Random(-number)
    body = json.dumps({"prompt": "slow", "max_tokens": SLOW_TOKENS, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    while True:
        await asyncio.sleep(chance.uniform(0, 5))
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=SLOW_READ_BYTES)
            writer.write(head % len(body) + body)
            until_then = time.monotonic() + chance.uniform(0.5, 1.5) * SLOW_READER_SECONDS
            while time.monotonic() < until_then and await reader.read(SLOW_READ_BYTES):  # noqa: ASYNC110 - slow on purpose
                await asyncio.sleep(SLOW_READ_SECONDS)
            writer.transport.abort()


async def killer(gateway: Gateway, tally: Tally) -> None:
    """Kill one engine after the other."""
    for replica in itertools.cycle(REPLICAS):
        await asyncio.sleep(KILL_EVERY_SECONDS)

        async def both_ready() -> bool:
            return all(each["ready"] for each in (await gateway.get("/ready"))["replicas"])

        await until(both_ready)
        os.kill((await gateway.seen(replica))["core"], signal.SIGKILL)
        tally.kills += 1


async def reloader(gateway: Gateway, tally: Tally) -> None:
    """Have the settings read again."""
    while True:
        await asyncio.sleep(RELOAD_EVERY_SECONDS)
        os.kill(gateway.pid, signal.SIGHUP)
        tally.reloads += 1


async def soak(minutes: float, connections: int, slow: int) -> bool:
    """Run it, print it, and return whether all is well."""
    tally, samples = Tally(), list[Sample]()
    async with running("--fake-core", None, Outcome()) as gateway:
        host = host_of(gateway.pid)
        tasks = [asyncio.create_task(client(gateway, number, tally)) for number in range(connections)]
        tasks += [asyncio.create_task(slow_reader(gateway, number)) for number in range(slow)]
        tasks += [asyncio.create_task(killer(gateway, tally)), asyncio.create_task(reloader(gateway, tally))]
        began = told = time.monotonic()
        print(
            "| minute | answers | kills | reloads | gateway MiB, descriptors | host MiB, descriptors | tables MiB |\n"
            + "|---" * 7
            + "|"
        )
        while time.monotonic() < began + 60 * minutes:
            await asyncio.sleep(SAMPLE_SECONDS)
            for task in tasks:
                if task.done():
                    task.result()
                    raise RuntimeError("a part of the load ended")
            samples.append(held(gateway, host))
            if time.monotonic() - told >= 60:
                told = time.monotonic()
                print(row((told - began) / 60, tally, samples[-1]), flush=True)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    print()
    for word, count in sorted(tally.got.items(), key=lambda item: -item[1]):
        print(f"{count:8d} {word}")
    grown = list(growth(samples))
    print("\n" + "\n".join(grown or ["nothing grew"]))
    return not grown and not tally.wrong() and tally.got["answer"] > 0 and tally.kills > 0


def row(minute: float, tally: Tally, sample: Sample) -> str:
    gateway, host = (f"{size >> 20}, {fds}" for size, fds in (
        (sample.gateway_bytes, sample.gateway_descriptors), (sample.host_bytes, sample.host_descriptors)
    ))  # fmt: skip
    cells = (
        f"{minute:.0f}",
        tally.got["answer"],
        tally.kills,
        tally.reloads,
        gateway,
        host,
        f"{sample.shared_bytes / (1 << 20):.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def growth(samples: list[Sample]) -> Iterator[str]:
    """What is larger in the last third than in the second, in words; the first third fills caches."""
    third = len(samples) // 3
    for name in Sample.__dataclass_fields__:
        before, after = (
            median(getattr(each, name) for each in part) for part in (samples[third : 2 * third], samples[2 * third :])
        )
        most = {"descriptors": before + DESCRIPTORS_GROWTH_MAX, "shared_bytes": before * (1 + SHARED_GROWTH_MAX)}
        bound = most.get(name.partition("_")[2], most.get(name, before * (1 + MEMORY_GROWTH_MAX)))
        if after > bound:
            yield f"{name.replace('_', ' ')} grew from {before:,.0f} to {after:,.0f}"


def main() -> int:
    """Returns the exit status."""
    options = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    options.add_argument("--minutes", type=float, default=10, help="how long (default: 10)")
    options.add_argument("--connections", type=int, default=2000, help="connections that are kept (default: 2000)")
    options.add_argument("--slow-readers", type=int, default=200, help="beside them (default: 200)")
    given = options.parse_args()
    return 0 if asyncio.run(soak(given.minutes, given.connections, given.slow_readers)) else 1


if __name__ == "__main__":
    sys.exit(main())
