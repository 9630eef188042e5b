"""What stands in front of the two replicas in a comparison: peerkv, other routers, a small relay with two simple policies."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.engines import Engines

IMPORT_NOTHING = {"peerkv": {"source": ""}}
"""In kv_transfer_params: tells our connector to import nothing for this request."""
SPILL = ("--balance-abs-threshold", "2", "--balance-rel-threshold", "1.2")


@dataclass(frozen=True, slots=True)
class FieldArm:
    """`imports`: replicas may import for its requests. `rust`: it is one of the routers of requirements.txt."""

    name: str
    imports: bool = False
    rust: bool = False

    @property
    def peerkv(self) -> bool:
        """Whether it is peerkv itself."""
        return self.name.startswith("peerkv")

    def extra_fields(self) -> Mapping[str, object]:
        """Fields added to each request: peerkv sends its own hints, requests of other arms must import nothing."""
        return {} if self.peerkv else {"kv_transfer_params": IMPORT_NOTHING}


PEERKV = FieldArm("peerkv", imports=True)
PEERKV_ALONE = FieldArm("peerkv without imports")
ROUND_ROBIN = FieldArm("relay round_robin")
STICKY = FieldArm("relay sticky")
ROUTERS = (
    FieldArm("vllm-router round_robin", rust=True),
    FieldArm("vllm-router cache_aware", rust=True),
    FieldArm("smg cache_aware", rust=True),
    FieldArm("vllm-router cache_aware spilling", rust=True),
    FieldArm("smg cache_aware spilling", rust=True),
)
ARMS = (PEERKV, PEERKV_ALONE, *ROUTERS, ROUND_ROBIN, STICKY)
CPU_ARMS = (PEERKV, PEERKV_ALONE, *ROUTERS[:3])
GPU_ARMS = (PEERKV, PEERKV_ALONE, ROUND_ROBIN, STICKY)


def command(
    arm: FieldArm, engines: Engines, routers: Path, port: int, spare_port: int
) -> tuple[Sequence[str], Mapping[str, str]]:
    """Return the command line that starts `arm` on `port`, and what to add to its environment.

    `routers` is the directory with the routers' commands, `spare_port` is for their metrics.
    """
    where = ("--host", "127.0.0.1", "--port", str(port))
    if arm.peerkv:
        argv = [sys.executable, "-m", "gateway.cli", "gateway", *where, "--run-dir", str(engines.run_dir)]
        return (*argv, "--log-level", "warning", *(() if arm.imports else ("--no-imports",))), {}
    program, policy, *more = arm.name.split()
    if program == "relay":
        argv = [sys.executable, "-m", "uvicorn", "bench.policy_relay:app", *where, "--loop", "uvloop", "--http", "httptools"]
        argv += ["--no-access-log", "--log-level", "warning", "--lifespan", "off"]
        return argv, {"BENCH_BACKENDS": ",".join(engines.urls), "BENCH_POLICY": policy}
    head = (str(routers / program), *(("launch",) if program == "smg" else ()))
    options = ["--worker-urls", *engines.urls, "--policy", policy, "--prometheus-port", str(spare_port)]
    options += ["--log-level", "warn" if program == "smg" else "warning", *(SPILL if more else ())]
    return (*head, *where, *options), {}
