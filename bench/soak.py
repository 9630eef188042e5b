"""`python -m bench.soak [--minutes 10]`: many connections and slow readers, while replicas die and settings are read again.

The gateway, its supervisor and two replicas are processes as `peerkv serve` runs them; in the place of vLLM's server stands
`tests/fake_engine.py`, with a core of its own that makes the steps and writes the block table. Printed each minute: what
clients got, and what the gateway and the host process hold. Each connection has a key with limits, a few of them one whose
limits are reached. It fails if what is held grew from the second third to the last, if a request got anything but an answer or
a clear error, if more than LOST_SHARE_MAX of the requests were lost with their replica, or if something stays reserved.
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
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import aiohttp

from bench.faults import REPLICAS, Gateway, Outcome, running, until
from bench.limits import LIMITS
from gateway.tenants.key_file import write_keys
from gateway.tenants.keys import Key, digest_of, new_token, no_keys

REQUEST_EVERY_SECONDS = 10.0
"""Each connection's requests are so far apart, on average."""
TOKENS, TOKEN_SECONDS = 24, 0.02
SLOW_TOKENS, SLOW_READ_BYTES, SLOW_READ_SECONDS = 4000, 512, 0.25
"""A slow reader's stream is far longer than the sockets on its way hold, and is given up before its end."""
SLOW_READER_SECONDS = 60.0
KILL_EVERY_SECONDS, RELOAD_EVERY_SECONDS = 30.0, 7.0
SAMPLE_SECONDS = 2.0
MEMORY_GROWTH_MAX, DESCRIPTORS_GROWTH_MAX, SHARED_GROWTH_MAX = 0.05, 16, 0.01
LOST_SHARE_MAX = 0.002
PROMPTS = 200
TENANTS, CONNECTIONS_PER_TIGHT_KEY = 20, 40
TIGHT_LIMITS = {"requests_per_minute": 60, "tokens_in_flight_max": 2000}
"""One connection in CONNECTIONS_PER_TIGHT_KEY has the key with these, which all of them together reach."""


@dataclass(frozen=True)
class Callers:
    """The keys of the connections, and the admin's."""

    admin: str
    tokens: Sequence[str]

    @classmethod
    def made(cls, path: Path) -> Callers:
        """New ones, written to a keys file: the first has limits that are reached."""
        found = cls(new_token(), [new_token() for _ in range(1 + TENANTS)])
        keys = no_keys()
        for number, token in enumerate(found.tokens):
            limits = LIMITS if number else TIGHT_LIMITS
            keys = keys.with_key(Key(name=f"tenant-{number}", sha256=digest_of(token.encode()).hex(), **limits))
        write_keys(path, keys)
        return found

    def token(self, connection: int) -> str:
        return self.tokens[0 if connection % CONNECTIONS_PER_TIGHT_KEY == 0 else 1 + connection % TENANTS]


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

    def lost_share(self) -> float:
        """Of the requests those that went down with their replica."""
        lost = sum(count for word, count in self.got.items() if word.endswith("replica_lost"))
        return lost / max(1, self.got.total())

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


def asked(prompt: str, tokens: int, **fake: float) -> dict[str, object]:
    """A request that another replica can go on with: what the stand-in is to do is in a field that it may have."""
    body = {"prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0}
    return body | ({"user": json.dumps(fake)} if fake else {})


async def client(gateway: Gateway, number: int, token: str, tally: Tally) -> None:
    """One connection that is kept: a stream now and then, mostly of prompts that others send too."""
    chance = random.Random(number)
    await asyncio.sleep(chance.uniform(0, REQUEST_EVERY_SECONDS))
    connector, headers = aiohttp.TCPConnector(limit=1), {"authorization": f"Bearer {token}"}
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        while True:
            prompt = f"document {chance.randrange(PROMPTS)} " * 40 + f"question {chance.random()}"
            tally.got[await streamed(session, gateway.url, asked(prompt, TOKENS, token_delay=TOKEN_SECONDS))] += 1
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


async def slow_reader(gateway: Gateway, number: int, token: str) -> None:
    """Reads a long stream a little at a time, gives it up in the middle, and begins anew."""
    chance = random.Random(-number)
    body = json.dumps(asked("slow", SLOW_TOKENS)).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += b"authorization: Bearer %b\r\ncontent-length: %d\r\n\r\n" % (token.encode(), len(body))
    while True:
        await asyncio.sleep(chance.uniform(0, 5))
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=SLOW_READ_BYTES)
            writer.write(head + body)
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


async def reserved(gateway: Gateway, callers: Callers) -> str:
    """What limits hold for requests once none is left, in words; "" for nothing."""
    headers = {"authorization": f"Bearer {callers.admin}"}
    held: list[str] = []

    async def nothing() -> bool:
        async with gateway.session.get(f"{gateway.url}/kv/stats", headers=headers) as answer:
            keys = [key for tenant in (await answer.json())["limits"] for key in tenant["keys"]]
        assert len(keys) == len(callers.tokens)
        held[:] = [
            f"{key['key']}: {key['requests_in_flight']} requests, {tokens} tokens"
            for key in keys
            if (tokens := key["limits"]["tokens_in_flight_max"]["used"]) or key["requests_in_flight"]
        ]
        return not held

    with contextlib.suppress(TimeoutError):
        await until(nothing)
    return "; ".join(held)


async def soak(minutes: float, connections: int, slow: int) -> bool:
    """Run it, print it, and return whether all is well."""
    with tempfile.TemporaryDirectory(prefix="soak") as name:
        keys = Path(name) / "keys.toml"
        callers = Callers.made(keys)
        settings = {"PEERKV_KEYS_FILE": str(keys), "PEERKV_ADMIN_KEY": callers.admin}
        async with running("--fake-core", None, Outcome(), settings) as gateway:
            tally, samples = await load(gateway, callers, minutes, connections, slow)
            left = await reserved(gateway, callers)
    print()
    for word, count in sorted(tally.got.items(), key=lambda item: -item[1]):
        print(f"{count:8d} {word}")
    grown, lost = list(growth(samples)), tally.lost_share()
    print(f"\n{lost:.4%} were lost with their replica; still reserved: {left or 'nothing'}")
    print("\n".join(grown or ["nothing grew"]))
    fine = not grown and not left and not tally.wrong() and lost <= LOST_SHARE_MAX
    return fine and tally.got["answer"] > 0 and tally.kills > 0


async def load(gateway: Gateway, callers: Callers, minutes: float, connections: int, slow: int) -> tuple[Tally, list[Sample]]:
    """Have clients ask for so long, and print a line a minute."""
    tally, samples, host = Tally(), list[Sample](), host_of(gateway.pid)
    parts = [
        *(client(gateway, number, callers.token(number), tally) for number in range(connections)),
        *(slow_reader(gateway, number, callers.token(number)) for number in range(slow)),
        *(killer(gateway, tally), reloader(gateway, tally)),
    ]
    tasks = [asyncio.create_task(part) for part in parts]
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
    return tally, samples


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
