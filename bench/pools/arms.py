"""One pool or private ones, behind peerkv's steering or in turn."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.engines import Engines
from bench.pools.reach import Reach

_STEERED = {Reach.POOL: ("gateway.cli",), Reach.CACHES: ("bench.taken_out.gateway", "pool"),
            Reach.NOTHING: ("bench.taken_out.gateway", "exchange")}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PoolArm:
    """`steered`: peerkv's gateway leads requests, and knows `reach`; else they go to the replicas in turn, and the connector
    itself looks for what it may import."""

    name: str
    reach: Reach
    steered: bool = True


SHARED = PoolArm("shared pool", Reach.POOL)
PRIVATE = PoolArm("private pools", Reach.CACHES)
APART = PoolArm("private pools, no imports", Reach.NOTHING)
APART_IN_TURN = PoolArm("private pools, no imports, in turn", Reach.NOTHING, steered=False)
SHARED_IN_TURN = PoolArm("shared pool, in turn", Reach.POOL, steered=False)
ARMS = (SHARED, PRIVATE, APART, APART_IN_TURN, SHARED_IN_TURN)
USUAL = ARMS[:4]


def command(arm: PoolArm, engines: Engines, port: int) -> tuple[Sequence[str], Mapping[str, str]]:
    """Return the command line that starts what stands before the replicas on `port`, and what to add to its environment."""
    where = ("--host", "127.0.0.1", "--port", str(port), "--log-level", "warning")
    if arm.steered:
        return (sys.executable, "-m", *_STEERED[arm.reach], "gateway", *where, "--run-dir", str(engines.run_dir)), {}
    argv = (sys.executable, "-m", "uvicorn", "bench.policy_relay:app", *where, "--loop", "uvloop", "--http", "httptools")
    env = {"BENCH_BACKENDS": ",".join(engines.urls), "BENCH_POLICY": "round_robin"}
    return (*argv, "--no-access-log", "--lifespan", "off"), env
