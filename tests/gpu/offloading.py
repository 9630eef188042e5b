"""Others' connectors that keep evicted KV in host memory, by the same prompts as `restore`: run both in one command.

vLLM's own two, and LMCache's where it is installed and its CUDA extension loads: without that extension LMCache would copy by
torch's own operations, and say so in a warning only.
"""

import importlib
from typing import Any

from tests.gpu.engine_pair import Bench
from tests.gpu.replica import Replica, median, prompt

REPEATS = 3
LMCACHE = "LMCacheConnectorV1"
CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector", LMCACHE)


def offloading(bench: Bench) -> None:
    """Time to the first token: computed, from the local cache, and from host memory after two other prompts took all blocks."""
    for name in bench.scale.connectors or CONNECTORS:
        try:
            version = lmcache_version() if name == LMCACHE else ""
        except ImportError as error:
            bench.row("offloading", connector=name, skipped=f"LMCache does not load: {error}")
            continue
        with_connector(bench, name, version)


def lmcache_version() -> str:
    """Import LMCache with its CUDA extension and return its version; ImportError says what is missing."""
    importlib.import_module("lmcache.cuda_ops")
    return str(importlib.import_module("lmcache").__version__)


def lmcache_environment(host_memory: int) -> dict[str, str]:
    """Return LMCache's settings for host memory of so many bytes; all that is not here has its default."""
    return {
        "LMCACHE_LOCAL_CPU": "True",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": str(host_memory / 2**30),
        "LMCACHE_CHUNK_SIZE": "256",
        "LMCACHE_TRACK_USAGE": "false",
    }


def with_connector(bench: Bench, name: str, version: str = "") -> None:
    """Measure one connector; of LMCache's the version goes into the rows."""
    tokens, block = bench.scale.restores[-1], bench.scale.arguments.get("block_size", 16)
    length = tokens + tokens // 4
    config: dict[str, Any] = {"kv_connector": name, "kv_role": "kv_both"}
    environment: dict[str, str] = {}
    if name == LMCACHE:
        environment, name = lmcache_environment(bench.scale.host_memory), f"{name} (LMCache {version})"
    else:
        config["kv_connector_extra_config"] = {"cpu_bytes_to_use": bench.scale.host_memory}
    small = {"max_model_len": length, "num_gpu_blocks_override": length // block + 8, "kv_transfer_config": config}
    if not bench.scale.devices[0]:  # theirs need a GPU
        name, small["kv_transfer_config"] = f"none in place of {name}", None
    arguments = bench.scale.arguments | small | {"environment": environment}
    engine = Replica(name, bench.scale.devices[1], bench.scale.model, bench.tables, **arguments).ready()
    try:
        engine.ask(prompt(bench.scale.restores[0], 3))
        with bench.turn():
            measure(bench, engine, name, tokens)
    finally:
        engine.stop()


def measure(bench: Bench, engine: Replica, name: str, tokens: int) -> None:
    """Print a row for each length; prompts of `tokens` take all blocks from those that were asked for before."""
    for size in bench.scale.restores:
        times: dict[str, list[float]] = {"cold": [], "hit": [], "restore": []}
        restored = []
        for turn in range(REPEATS):
            ids = prompt(size, 77 * size + turn)
            times["cold"].append(engine.ask(ids).first_seconds)
            times["hit"].append(engine.ask(ids).first_seconds)
            for other in (1, 2):
                engine.ask(prompt(tokens, 77 * size + 100 * turn + 1000 * other))
            engine.ask(prompt(20, turn), 4)
            answer = engine.ask(ids)
            times["restore"].append(answer.first_seconds)
            restored.append(answer.cached)
        ms = {f"{kind}_ms": median(found) * 1e3 for kind, found in times.items()}
        bench.row(
            "offloading",
            connector=name,
            tokens=size,
            **ms,
            cold_over_restore=ms["cold_ms"] / ms["restore_ms"],
            cached=restored,
        )
