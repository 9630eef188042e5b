"""`python -m bench.faults`: what clients get while replicas die, stand still or fail, and descriptors run out.

The gateway, its supervisor and two replicas are processes as `peerkv serve` runs them; in the place of vLLM's server stands
`tests/fake_engine.py`, with a core of its own that makes the steps and writes the block table. Each case starts anew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from bench.child_process import Started

ENGINE = Path(__file__).resolve().parents[1] / "tests" / "fake_engine.py"
READY_SECONDS_MAX = 120.0
ANSWER_SECONDS_MAX = 120.0
PROBE_SECONDS = 0.02
DESCRIPTORS = 1024
IN_FLIGHT = 200
SILENT, SILENT_SECONDS = 1400, 1.0
FROZEN_REQUESTS, FROZEN_EVERY_SECONDS = 20, 0.5
FAILING_REQUESTS, FAILING_ABREAST = 400, 8
REPLICAS = ("replica-0", "replica-1")


@dataclass
class Outcome:
    """What became of a case's requests. `stall_seconds` is the longest answer of the gateway's own /health."""

    held: int = 0
    answers: dict[int, int] = field(default_factory=dict)
    longest_seconds: float = 0.0
    stall_seconds: float = 0.0
    memory_bytes: int = 0
    note: str = ""

    def row(self, name: str) -> str:
        """A line of the table in BENCHMARKS.md."""
        told = ", ".join(f"{count} x {status or 'no answer'}" for status, count in sorted(self.answers.items()))
        memory = f"{self.memory_bytes / (1 << 20):.0f} MiB"
        cells = (name, self.held, told, f"{self.longest_seconds:.1f}", f"{self.stall_seconds:.2f}", memory, self.note)
        return f"| {' | '.join(map(str, cells))} |"


class Gateway:
    """A running `peerkv serve`."""

    def __init__(self, directory: Path, port: int, session: aiohttp.ClientSession, pid: int, outcome: Outcome) -> None:
        self.directory, self.port, self.session, self.pid, self.outcome = directory, port, session, pid, outcome
        self.url = f"http://127.0.0.1:{port}"

    async def get(self, path: str) -> Any:
        async with self.session.get(self.url + path) as answer:
            return await answer.json()

    async def ask(self, **body: Any) -> None:
        """Send a completion and count what came of it."""
        began, outcome = time.perf_counter(), self.outcome
        outcome.held += 1
        status = 0
        with contextlib.suppress(aiohttp.ClientError):
            async with self.session.post(f"{self.url}/v1/completions", json={"prompt": "x", "max_tokens": 3} | body) as answer:
                await answer.read()
                status = answer.status
        outcome.answers[status] = outcome.answers.get(status, 0) + 1
        if status == 200:
            outcome.longest_seconds = max(outcome.longest_seconds, time.perf_counter() - began)

    async def seen(self, replica: str) -> Any:
        """What the engine saw."""
        connector = aiohttp.UnixConnector(str(self.directory / "run" / f"{replica}.sock"))
        async with aiohttp.ClientSession(connector=connector) as session, session.get("http://x/fake/seen") as answer:
            return await answer.json()

    async def restarts(self) -> int:
        """Of all replicas."""
        return sum(replica["restarts"] for replica in (await self.get("/ready"))["replicas"])

    async def watch(self) -> None:
        """Measure the gateway itself, until cancelled."""
        while True:
            began = time.perf_counter()
            with contextlib.suppress(aiohttp.ClientError):
                await self.get("/health")
            self.outcome.stall_seconds = max(self.outcome.stall_seconds, time.perf_counter() - began)
            self.outcome.memory_bytes = max(self.outcome.memory_bytes, _resident_bytes(self.pid))
            await asyncio.sleep(PROBE_SECONDS)


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait for a condition, ANSWER_SECONDS_MAX at most."""
    async with asyncio.timeout(ANSWER_SECONDS_MAX):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.1)


async def deadly(gateway: Gateway) -> None:
    """Requests under way on both replicas, and one among them that ends its engine."""
    slow = {"max_tokens": 40, "fake": {"token_delay": 0.1}}
    beside = [asyncio.create_task(gateway.ask(**slow)) for _ in range(IN_FLIGHT)]

    async def all_run() -> bool:
        stats = await gateway.get("/kv/stats")
        return bool(sum(each["load"]["decoding_requests"] for each in stats["replicas"]) >= IN_FLIGHT)

    await until(all_run)
    await gateway.ask(fake={"die": "before"})
    await asyncio.gather(*beside)
    gateway.outcome.note = f"{await gateway.restarts()} replica restarted"


async def few_descriptors(gateway: Gateway) -> None:
    """Silent connections and more requests than descriptors allow."""
    silent = []
    for _ in range(SILENT):
        connection = socket.socket()
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            connection.connect(("127.0.0.1", gateway.port))
        silent.append(connection)
    await asyncio.sleep(SILENT_SECONDS)
    await asyncio.gather(*(gateway.ask(fake={"delay": 1}) for _ in range(560)))
    for connection in silent:
        connection.close()
    beside_nobody = Outcome()
    gateway.outcome, measured = beside_nobody, gateway.outcome
    await asyncio.sleep(1)
    await asyncio.gather(*(gateway.ask(fake={"delay": 1}) for _ in range(300)))
    gateway.outcome = measured
    after = beside_nobody.answers.get(200, 0)
    measured.note = (
        f"{SILENT} silent connections; {await gateway.restarts()} replicas restarted; {after} of 300 answered after them"
    )


async def frozen(gateway: Gateway) -> None:
    """One engine core is stopped while requests keep coming."""
    await asyncio.gather(*(gateway.ask() for _ in range(8)))
    gateway.outcome.held, gateway.outcome.answers = 0, {}
    os.kill((await gateway.seen(REPLICAS[0]))["core"], signal.SIGSTOP)
    asked = []
    for _ in range(FROZEN_REQUESTS):
        asked.append(asyncio.create_task(gateway.ask()))
        await asyncio.sleep(FROZEN_EVERY_SECONDS)
    await asyncio.gather(*asked)

    async def restarted() -> bool:
        return await gateway.restarts() > 0

    await until(restarted)
    gateway.outcome.note = "the frozen engine was restarted"


async def failing(gateway: Gateway) -> None:
    """One replica answers 500 at once."""
    for _ in range(FAILING_REQUESTS // FAILING_ABREAST):
        await asyncio.gather(*(gateway.ask() for _ in range(FAILING_ABREAST)))
    first = len((await gateway.seen(REPLICAS[0]))["requests"])
    gateway.outcome.note = f"{first} went to the failing replica first"


Case = tuple[Callable[[Gateway], Awaitable[None]], str, int | None]
CASES: dict[str, Case] = {
    "a request that ends its engine": (deadly, "--fake-core", None),
    f"{DESCRIPTORS} descriptors": (few_descriptors, "", DESCRIPTORS),
    "an engine that stands still": (frozen, "--fake-core", None),
    "a replica that answers 500": (failing, "--fake-core --fake-status 500 --fake-exit-on replica-0", None),
}


@contextlib.asynccontextmanager
async def running(
    engine: str, descriptors: int | None, outcome: Outcome, settings: Mapping[str, str] | None = None
) -> AsyncIterator[Gateway]:
    """Start a gateway over two stand-ins, and end it; `settings` are variables of its environment."""
    with tempfile.TemporaryDirectory(prefix="faults") as name, socket.create_server(("127.0.0.1", 0)) as probe:
        directory, port = Path(name), probe.getsockname()[1]
        probe.close()
        env = {"PEERKV_LAUNCHER": f"{shlex.join([sys.executable, str(ENGINE)])} {engine}", "PEERKV_PORT": str(port)}
        env |= {f"PEERKV_{each.upper()}_DIR": str(directory / each) for each in ("run", "table", "log")}
        env |= {"PEERKV_LIMITS_FILE": str(directory / "limits.json")} | dict(settings or {})
        limit = ["prlimit", f"--nofile={descriptors}:{descriptors}"] if descriptors else []
        argv = [*limit, sys.executable, "-m", "gateway.cli", "serve", "--replicas", str(len(REPLICAS))]
        started = Started(argv, directory / "peerkv.txt", env)
        try:
            timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS_MAX)
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
                gateway = Gateway(directory, port, session, started.pid, outcome)
                deadline = time.monotonic() + READY_SECONDS_MAX
                while not await _ready(gateway):
                    started.check(time.monotonic() < deadline)
                    await asyncio.sleep(0.2)
                yield gateway
        finally:
            started.end()


async def _ready(gateway: Gateway) -> bool:
    try:
        return all(replica["ready"] for replica in (await gateway.get("/ready"))["replicas"] or [{"ready": False}])
    except aiohttp.ClientError:
        return False


async def measure(case: Case) -> Outcome:
    """Run one case."""
    work, engine, descriptors = case
    outcome = Outcome()
    async with running(engine, descriptors, outcome) as gateway:
        watching = asyncio.create_task(gateway.watch())
        await work(gateway)
        watching.cancel()
    return outcome


def main() -> None:
    """Print a table."""
    options = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__)
    options.add_argument("--only", help="cases whose name contains this (default: all)", default="")
    wanted = options.parse_args().only
    print("| case | requests | answers | longest answer, s | longest stall of the gateway, s | memory | |\n|" + "---|" * 7)
    for name, case in CASES.items():
        if wanted in name:
            print(asyncio.run(measure(case)).row(name), flush=True)


if __name__ == "__main__":
    main()
