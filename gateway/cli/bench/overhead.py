"""What the gateway adds to a small request: the same request through it and directly to the replica's socket, in turn."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from engine.fleet import FileFleet, FleetError
from gateway.cli.bench.installation import Installation, NotMeasured, completion
from gateway.cli.bench.spread import Spread, spread
from gateway.cli.bench.words import Words
from gateway.tenants.loopback import is_loopback_url

PROMPT_TOKENS = 8
WARM_PAIRS = 3


@dataclass(frozen=True, slots=True)
class Overhead:
    """Seconds. `added` is the difference within each pair; None if the replica's socket is not on this machine.

    `round_trip` is a request that the gateway answers itself.
    """

    round_trip: Spread
    through: Spread
    direct: Spread | None
    added: Spread | None


def sockets(url: str, run_dir: Path) -> Mapping[str, str]:
    """Return the replicas' sockets by name if the gateway at `url` is on this machine and uses `run_dir`; otherwise nothing."""
    if not is_loopback_url(url):
        return {}
    try:
        replicas = FileFleet(run_dir).snapshot().ready()
    except FleetError:
        return {}
    return {replica.name: replica.socket for replica in replicas if Path(replica.socket).exists()}


async def measure(
    installation: Installation, model: str, replica: str, socket: str, words: Words, pairs: int, step: Callable[[], None]
) -> Overhead:
    """Request one token `pairs` times each way. `socket` is the replica's, empty if unreachable. Raises NotMeasured."""
    trips, through, direct = [], [], []
    connector = aiohttp.UnixConnector(path=socket) if socket else aiohttp.TCPConnector()
    async with aiohttp.ClientSession(connector=connector) as session:
        for number in range(WARM_PAIRS + pairs):
            body = completion(model, words.text(PROMPT_TOKENS), 1)
            times = {}
            for way in ("direct", "through") if number % 2 else ("through", "direct"):
                if way == "through":
                    times[way] = await installation.whole(body, replica)
                elif socket:
                    times[way] = await _direct(session, body)
            trip = await installation.round_trip()
            step()
            if number >= WARM_PAIRS:
                trips.append(trip)
                through.append(times["through"])
                direct += [times["direct"]] if socket else []
    added = [mine - its for mine, its in zip(through, direct, strict=False)]
    trip_spread, through_spread = spread(trips), spread(through)
    assert trip_spread is not None
    assert through_spread is not None
    return Overhead(trip_spread, through_spread, spread(direct), spread(added))


async def _direct(session: aiohttp.ClientSession, body: Mapping[str, object]) -> float:
    began = time.perf_counter()
    try:
        async with session.post("http://replica/v1/completions", json=body) as response:
            text = await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise NotMeasured(f"a request to a replica's socket broke: {error!r}") from error
    if response.status != 200:
        raise NotMeasured(f"a replica answered its socket with status {response.status}: {text[:300]}")
    return time.perf_counter() - began
