"""What keys and limits cost a request, in process: `python -m bench.limits`.

All steps of one request, one after the other, without HTTP: the key is looked up; with limits the request is let in, its tokens
are reserved, the headers are made and it is settled. 64 requests are under way, the keys file has 1,000 keys. Figures are
microseconds of this thread's processor time: the 20th percentile of means over REQUESTS requests, since other programs use the
same caches and cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable
from statistics import fmean

from bench.report import quantile
from gateway.limits.book import Reservation
from gateway.limits.limiter import Limiter
from gateway.limits.prices import Prices, Usage
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


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="bench.limits", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=200, help=f"rounds of {REQUESTS} requests (default: 200)")
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
