"""What keys and limits cost a request, in process: `python -m bench.limits [--shared]`.

All steps of one request, one after the other, without HTTP: the key is looked up; with limits the request is let in, its tokens
are reserved, the headers are made and it is settled. 64 requests are under way, the keys file has 1,000 keys. Figures are
microseconds of this thread's processor time: the 20th percentile of means over REQUESTS requests, since other programs use the
same caches and cores.

With `--shared` a Valkey server on loopback counts as well (`--limits-valkey`): the figures are this thread's processor time a
request, and how long requests waited for the server, with UNDER_WAY requests that each wait for it at the same time.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable
from statistics import fmean

import uvloop

from bench.report import quantile
from bench.tiers.stores import vault
from engine.frame_tiers.vault.address import VaultAddress
from gateway.limits.book import Reservation
from gateway.limits.limiter import Limiter
from gateway.limits.prices import Prices, Usage
from gateway.limits.shared.shared_limits import SharedLimits
from gateway.tenants.keys import Key, Keys, digest_of, new_token
from gateway.tenants.tenants import Tenants

KEYS = 1000
UNDER_WAY = 64
REQUESTS = 200
START, SPEED = 1_800_000_000, 100
"""The limits' clock runs ahead, so that all seconds of a minute are in use."""
LIMITS = {
    "requests_per_minute": 10**9,
    "tokens_per_minute": 10**12,
    "requests_in_flight_max": 10**6,
    "tokens_in_flight_max": 10**9,
    "tokens_per_day": 10**12,
    "tokens_per_month": 10**12,
}


def tenants_with(limits: dict[str, int]) -> tuple[Tenants, bytes]:
    """KEYS keys with these limits, and the Authorization header of one."""
    tokens = [new_token() for _ in range(KEYS)]
    keys = [
        Key(name=f"key-{number}", tenant=f"tenant-{number % 100}", sha256=digest_of(token.encode()).hex(), **limits)
        for number, token in enumerate(tokens)
    ]
    return Tenants([], keys=Keys(salt_secret="ab" * 32, keys=tuple(keys))), b"Bearer " + tokens[KEYS // 2].encode()


def request_of(tenants: Tenants, limiter: Limiter, header: bytes) -> Callable[[], None]:
    """One request's steps; the one from UNDER_WAY requests ago ends."""
    flying: deque[Reservation] = deque()

    def request() -> None:
        key = tenants.authenticate(header).key
        if key is None:
            return
        reservation = limiter.begin(key)
        limiter.hold(reservation, Usage(200, 0, 16))
        flying.append(reservation)
        if len(flying) > UNDER_WAY:
            limiter.settle(flying.popleft(), Usage(40, 160, 16))
        limiter.header_lines(key)

    return request


async def shared(address: VaultAddress, requests: int) -> tuple[float, list[float]]:
    """Processor time of a request, and the waits of all, in seconds."""
    tenants, header = tenants_with(LIMITS)
    limits = SharedLimits(address, wait_seconds_max=5.0)
    limiter = Limiter(Prices(0.1, 1.0), reservation_seconds=3600, shared=limits)
    await limits.connect()
    waits: list[float] = []

    async def client() -> None:
        for _ in range(requests // UNDER_WAY):
            key = tenants.authenticate(header).key
            assert key is not None
            reservation = limiter.begin(key)
            limiter.hold(reservation, Usage(200, 0, 16))
            began = time.perf_counter()
            await limiter.agree(reservation)
            waits.append(time.perf_counter() - began)
            limiter.settle(reservation, Usage(40, 160, 16))
            limiter.header_lines(key)

    began = time.thread_time()
    await asyncio.gather(*(client() for _ in range(UNDER_WAY)))
    spent = time.thread_time() - began
    told = limits.stats()
    await limiter.close()
    if told.alone_requests or not told.up:
        raise RuntimeError(f"the server did not decide on all: {told}")
    return spent / len(waits), waits


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="bench.limits", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=200, help=f"rounds of {REQUESTS} requests (default: 200)")
    parser.add_argument("--shared", action="store_true", help="with a server that counts for several gateways, too")
    given = parser.parse_args()
    print("| keys | µs a request |\n|---|---|")
    for name, limits in (("without limits", {}), ("with limits", LIMITS)):
        tenants, header = tenants_with(limits)
        limiter = Limiter(Prices(0.1, 1.0), reservation_seconds=3600, clock=lambda: START + time.perf_counter() * SPEED)
        request, means = request_of(tenants, limiter, header), []
        for _ in range(given.rounds):
            times = []
            for _ in range(REQUESTS):
                began = time.thread_time()
                request()
                times.append(time.thread_time() - began)
            means.append(fmean(times))
        print(f"| {name} | {quantile(means, 0.2) * 1e6:.1f} |")
    if given.shared:
        with vault() as address:
            spent, waits = uvloop.run(shared(address, given.rounds * REQUESTS))
        half, most = (quantile(waits, share) * 1e3 for share in (0.5, 0.99))
        print(f"| with limits of several gateways | {spent * 1e6:.1f} |")
        print(f"\nRequests waited for the server for {half:.2f} ms (p50), {most:.2f} ms (p99).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
