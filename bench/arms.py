"""The proxies under test: how each one is started, and what it needs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

KEY = "bench-key-0123456789abcdef"
TENANT = "bench"


@dataclass(frozen=True, slots=True)
class Backends:
    """The two mock replicas, and where peerkv finds them."""

    urls: tuple[str, ...]
    run_dir: Path
    config: Path
    limited: Path
    routers: Path
    """The directory with the routers' commands."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One proxy. `authenticates`: callers need KEY; `limited`: which has every limit that there is."""

    name: str
    authenticates: bool = False
    limited: bool = False


@dataclass(frozen=True, slots=True)
class Launch:
    """A command line and what to add to its environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


ARMS = (
    Arm("no proxy"),
    Arm("asgi+aiohttp"),
    Arm("vllm-router round_robin"),
    Arm("vllm-router cache_aware"),
    Arm("smg cache_aware"),
    Arm("smg cache_aware +auth", authenticates=True),
    Arm("peerkv"),
    Arm("peerkv +auth", authenticates=True),
    Arm("peerkv +limits", authenticates=True, limited=True),
)
WITHOUT = tuple(Arm(f"peerkv -{name}") for name in ("heads", "batching", "collector", "sampling", "continuity"))
"""peerkv without a mechanism, which a file of bench/taken_out/gateway takes out. To be asked for by name."""
DIRECT = ARMS[0].name


def launch(arm: Arm, backends: Backends, port: int, spare_port: int) -> Launch:
    """Return how to start `arm` on `port`; `spare_port` is for anything else it listens on."""
    program, _, rest = arm.name.partition(" ")
    policy = rest.partition(" ")[0]
    where = ("--host", "127.0.0.1", "--port", str(port))
    match program:
        case "asgi+aiohttp":
            argv = [sys.executable, "-m", "uvicorn", "bench.plain_relay:app", *where, "--loop", "uvloop", "--http", "httptools"]
            argv += ["--no-access-log", "--log-level", "warning", "--lifespan", "off"]
            return Launch(tuple(argv), {"BENCH_BACKENDS": ",".join(backends.urls)})
        case "vllm-router" | "smg":
            head = (str(backends.routers / program), *(("launch",) if program == "smg" else ()))
            options = ["--worker-urls", *backends.urls, "--policy", policy, "--prometheus-port", str(spare_port)]
            options += ["--log-level", "warn" if program == "smg" else "warning"]
            if arm.authenticates:
                options += ["--tenant-api-key", f"{TENANT}:{KEY}"]
            return Launch((*head, *where, *options))
        case "peerkv":
            module = ("bench.taken_out.gateway", policy.removeprefix("-")) if policy.startswith("-") else ("gateway.cli",)
            argv = [sys.executable, "-m", *module, "gateway", *where]
            settings = backends.limited if arm.limited else backends.config
            config = ("--config", str(settings)) if arm.authenticates else ()
            env = {"PEERKV_RUN_DIR": str(backends.run_dir), "PEERKV_LOG_LEVEL": "warning"}
            return Launch((*argv, *config), env)
        case _:
            raise ValueError(f"no arm {arm.name}")
