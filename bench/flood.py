"""`python -m bench.flood`: what one tenant that sends ten times what it may costs the others.

The gateway, its supervisor and two replicas are processes as `peerkv serve` runs them; in the place of vLLM's server stands
`tests/fake_engine.py`. Other tenants send streams at random moments, the same ones in each phase: phases in which they are
alone and phases in which one more tenant sends FLOOD_FACTOR times its requests a minute take turns. It fails if the others'
p99, of the first token or of the whole answer, is more than P99_GROWTH_MAX times theirs alone, if one of them was refused, or
if the flood got more or fewer answers than its limit has.

With `--no-limit` that tenant may send what it likes, and has a request under way on each of `--connections` at any time, more
than replicas take at once: what keeps it from the others' turns is the fair queue of `--replica-requests-max`. The others then
wait for places that requests leave: how long is told, and it fails only if one of them was refused.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from bench.faults import Gateway, Outcome, running
from bench.report import quantile
from gateway.tenants.key_file import write_keys
from gateway.tenants.keys import Key, digest_of, new_token, no_keys

FLOOD_FACTOR = 10
P99_GROWTH_MAX = 1.2
FLOOD_PER_MINUTE = 240
TENANTS, TENANT_PER_SECOND = 4, 10.0
TOKENS, TOKEN_SECONDS = 8, 0.03
WARM_SECONDS = 3.0
FLOOD_CONNECTIONS = 64
PROMPT = "A document that everybody has. " * 8


@dataclass
class Times:
    """Of the others' requests, in seconds, and what they got that was no whole answer."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)

    def add(self, other: Times) -> None:
        self.first += other.first
        self.whole += other.whole
        self.wrong += other.wrong

    def cells(self) -> str:
        """Cells of the table, milliseconds."""
        figures = [quantile(values, share) * 1e3 for values in (self.first, self.whole) for share in (0.5, 0.99)]
        return " | ".join([str(len(self.whole)), *(f"{figure:.1f}" for figure in figures)])


@dataclass(frozen=True)
class Callers:
    """The keys: that of the tenant that floods, and the others'."""

    flood: str
    others: tuple[str, ...]

    @classmethod
    def made(cls, path: Path, per_minute: int | None) -> Callers:
        """New ones, written to a keys file. The others have limits too, which they do not reach; None: the flood has none."""
        found = cls(new_token(), tuple(new_token() for _ in range(TENANTS)))
        keys = no_keys().with_key(_key("flood", found.flood, per_minute))
        for number, token in enumerate(found.others):
            keys = keys.with_key(_key(f"tenant-{number}", token, 10**6))
        write_keys(path, keys)
        return found


def _key(name: str, token: str, per_minute: int | None) -> Key:
    return Key(name=name, tenant=name, sha256=digest_of(token.encode()).hex(), requests_per_minute=per_minute)


def arrivals(seconds: float, per_second: float, seed: int) -> Iterator[float]:
    """Random moments, as many a second on average."""
    chance, at = random.Random(seed), 0.0
    while (at := at + chance.expovariate(per_second)) < seconds:
        yield at


async def others(gateway: Gateway, callers: Callers, seconds: float) -> Times:
    """The other tenants' requests, those of the first WARM_SECONDS not counted."""
    found, began = Times(), time.perf_counter()

    async def one(at: float, token: str) -> None:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        await ask(gateway, token, found if at >= WARM_SECONDS else Times())

    async with asyncio.TaskGroup() as tasks:
        for number, token in enumerate(callers.others):
            for at in arrivals(seconds, TENANT_PER_SECOND, number):
                tasks.create_task(one(at, token))
    return found


async def ask(gateway: Gateway, token: str, found: Times) -> None:
    """One stream."""
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "stream": True, "fake": {"token_delay": TOKEN_SECONDS}}
    headers = {"authorization": f"Bearer {token}"}
    began, first = time.perf_counter(), 0.0
    try:
        async with gateway.session.post(f"{gateway.url}/v1/completions", json=body, headers=headers) as answer:
            content = b""
            async for piece in answer.content.iter_any():
                first = first or time.perf_counter()
                content += piece
    except aiohttp.ClientError as error:
        found.wrong[type(error).__name__] += 1
        return
    if answer.status != 200 or not content.endswith(b"data: [DONE]\n\n"):
        found.wrong[f"status {answer.status}"] += 1
        return
    found.first.append(first - began)
    found.whole.append(time.perf_counter() - began)


def flood(
    port: int, token: str, per_second: float, seconds: float, connections: int, told: multiprocessing.connection.Connection
) -> None:
    """A process of its own: so many requests a second, whatever becomes of them, or one on each connection at any time if that
    is 0; tells how often it got which status."""
    told.send(asyncio.run(_flood(port, token, per_second, seconds, connections)))


async def _flood(port: int, token: str, per_second: float, seconds: float, connections: int) -> Counter[int]:
    statuses: Counter[int] = Counter()
    chance = random.Random(0)
    headers = {"authorization": f"Bearer {token}"}
    connector = aiohttp.TCPConnector(limit=connections)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def one(tokens: int = TOKENS) -> None:
            body = {"prompt": PROMPT, "max_tokens": tokens, "fake": {"token_delay": TOKEN_SECONDS}}
            async with session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as answer:
                await answer.read()
                statuses[answer.status] += 1

        async def one_after_another() -> None:
            while time.perf_counter() < began + seconds:
                await one(chance.randint(1, 2 * TOKENS - 1))  # else all would end at the same moments

        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(0 if per_second else connections):
                tasks.create_task(one_after_another())
            for number in range(int(per_second * seconds)):
                await asyncio.sleep(max(0.0, began + number / per_second - time.perf_counter()))
                tasks.create_task(one())
    return statuses


@dataclass(frozen=True)
class Wanted:
    """What is to be measured."""

    rounds: int
    seconds: float
    per_minute: int | None
    valkey: str
    connections: int


async def beside_a_flood(gateway: Gateway, callers: Callers, wanted: Wanted) -> tuple[Times, Counter[int]]:
    """The others' requests while one tenant sends too many; also what that one got."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    rate = 0.0 if wanted.per_minute is None else FLOOD_FACTOR * wanted.per_minute / 60
    arguments = (gateway.port, callers.flood, rate, wanted.seconds, wanted.connections, there)
    process = context.Process(target=flood, args=arguments, daemon=True)
    process.start()
    try:
        found = await others(gateway, callers, wanted.seconds)
        async with asyncio.timeout(60):
            statuses: Counter[int] = await asyncio.to_thread(here.recv)
    finally:
        process.kill()
    return found, statuses


async def measure(wanted: Wanted, turns: int) -> bool:
    """All rounds with so many requests at each replica at once (0: all); print them, and return whether all is well."""
    alone, beside, got = Times(), Times(), Counter[int]()
    with tempfile.TemporaryDirectory(prefix="flood") as name:
        callers = Callers.made(Path(name) / "keys.toml", wanted.per_minute)
        env = {"PEERKV_KEYS_FILE": f"{name}/keys.toml", "PEERKV_REPLICA_REQUESTS_MAX": str(turns)}
        if wanted.valkey:
            env["PEERKV_LIMITS_VALKEY"] = wanted.valkey
        async with running("", None, Outcome(), env) as gateway:
            for _ in range(wanted.rounds):
                alone.add(await others(gateway, callers, wanted.seconds))
                times, statuses = await beside_a_flood(gateway, callers, wanted)
                beside.add(times)
                got += statuses
    words = f"{turns} a replica" if turns else "all at once"
    print(f"| {words} | alone | {alone.cells()} | |")
    ratios = [
        quantile(mine, 0.99) / quantile(base, 0.99) for mine, base in ((beside.first, alone.first), (beside.whole, alone.whole))
    ]
    print(f"| {words} | beside the flood | {beside.cells()} | {' and '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True)
    wrong = alone.wrong + beside.wrong
    told = ", ".join(f"{count} x {status}" for status, count in sorted(got.items()))
    if wanted.per_minute is None:
        exact, verdict = got == {200: got[200]}, f"{got[200] / wanted.seconds / wanted.rounds:.0f} a second"
    else:
        exact = got == {200: wanted.rounds * wanted.per_minute, 429: got[429]}
        verdict = f"{'exactly' if exact else 'not'} its limit in each of {wanted.rounds} phases"
    print(f"\nThe flood got {told}: {verdict}.", end=" ")
    print(
        f"The others got {', '.join(f'{count} x {what}' for what, count in wrong.items()) or 'whole answers alone'}.\n",
        flush=True,
    )
    return exact and not wrong and (wanted.per_minute is None or max(ratios) <= P99_GROWTH_MAX)


def main() -> int:
    """Measure and print a table; returns the exit status."""
    options = argparse.ArgumentParser(prog="python -m bench.flood", description=__doc__, allow_abbrev=False)
    options.add_argument("--rounds", type=int, default=2, help="of a phase alone and a phase beside the flood (default: 2)")
    options.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="of a phase: with 35 to 60 the flood has one minute's limit in each (default: 60)",
    )
    options.add_argument(
        "--no-limit",
        action="store_true",
        help="the flood's key has no limit: turns alone keep it in bounds (default: it has one)",
    )
    options.add_argument(
        "--per-minute", type=int, default=FLOOD_PER_MINUTE, help=f"limit of the flood's key (default: {FLOOD_PER_MINUTE})"
    )
    options.add_argument(
        "--replica-requests-max", type=int, nargs="*", default=[0, 16], metavar="N", help="gateways to measure (default: 0 16)"
    )
    options.add_argument(
        "--connections", type=int, default=FLOOD_CONNECTIONS, metavar="N", help=f"of the flood (default: {FLOOD_CONNECTIONS})"
    )
    options.add_argument("--limits-valkey", default="", metavar="URL", help="count there (default: in the gateway)")
    given = options.parse_args()
    per_minute = None if given.no_limit else given.per_minute
    wanted = Wanted(given.rounds, given.seconds, per_minute, given.limits_valkey, given.connections)
    print(
        "| at the replicas | others | requests | first token p50, ms | p99 | whole p50, ms | p99 | p99 of alone |\n"
        + "|---" * 8
        + "|"
    )
    fine = [asyncio.run(measure(wanted, turns)) for turns in given.replica_requests_max]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
