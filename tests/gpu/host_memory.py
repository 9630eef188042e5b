"""Host memory on GPUs: what a restore takes beside a hit, an import and a cold prompt, and what storing costs the steps."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from engine.host_process.kept_memory import VARIABLE, KeptMemories, encode_kept
from tests.gpu.engine_pair import GRAPHS, Bench
from tests.gpu.import_times import DECODES, Pulse, _delivery
from tests.gpu.replica import Replica, median, prompt
from transport.keys import chain_keys, root_key
from transport.table.deliveries import Delivery
from transport.table.reader import TableReader
from transport.table.tiers import host_memory_of

OWN = "replica-1"
TIER = host_memory_of(OWN)
OPEN_SECONDS_MAX = 60.0
REPEATS = 3
REST_SECONDS = 1.0
ROUNDS = 2
ROUND_SECONDS = 5.0
FULL_SECONDS_MAX = 15.0
STORE_COUNTERS = ("published_blocks", "tier_ahead_blocks", "evictions", "tier_dropped_blocks")


def keeping(bench: Bench, keeper: KeptMemories, size: int = 0) -> dict[str, Any]:
    """Return an engine's arguments with which it stores in host memory, of `size` bytes or the scale's; its cache is small."""
    kept = encode_kept(keeper.keep(OWN, size or bench.scale.host_memory))
    tokens, block = bench.scale.restores[-1], bench.scale.arguments.get("block_size", 16)
    length = tokens + tokens // 4
    return {
        "environment": {VARIABLE: kept},
        "max_model_len": length,
        "num_gpu_blocks_override": length // block + 8,
    }


@contextmanager
def with_host_memory(bench: Bench) -> Iterator[tuple[Replica, Replica, KeptMemories]]:
    """Two engines, the second with host memory, that have opened it; its keeper is this process."""
    bench.tables.mkdir(mode=0o700, parents=True, exist_ok=True)
    keeper = KeptMemories(bench.tables)
    with bench.pair(importer=keeping(bench, keeper)) as (a, b):
        began, seed, tokens = time.monotonic(), time.time_ns(), bench.scale.restores[0]
        while True:
            seed += 1
            ids = prompt(tokens, seed)
            b.ask(ids, source="")
            lose(bench, b, ids, seed)
            if a.ask(ids, source=TIER).cached:
                break
            if time.monotonic() - began > OPEN_SECONDS_MAX:
                raise TimeoutError(f"nothing was stored and restored in {OPEN_SECONDS_MAX} s")
        bench.row("host memory", open_after_seconds=time.monotonic() - began, mib=bench.scale.host_memory >> 20)
        yield a, b, keeper


def lose(bench: Bench, engine: Replica, ids: list[int], seed: int, tokens: int = 0) -> list[float]:
    """Have an engine give up all blocks of a prompt, by others of its length or of `tokens`; return what their first took."""
    times: list[float] = []
    until = time.monotonic() + 30
    while held(bench, OWN, ids):
        if time.monotonic() > until:
            raise TimeoutError("a prompt stays in the cache")
        times.append(engine.ask(prompt(tokens or len(ids), seed + len(times)), source="").first_seconds)
    engine.ask(prompt(20, seed + 99, 1000), 4, source="")  # in its steps the workers tell that the last copies ended
    return times


def held(bench: Bench, name: str, ids: list[int], salt: str = "") -> int:
    """Return how many leading blocks of a prompt a table offers."""
    table: TableReader = bench.directory.tables()[name]
    root = root_key(table.fingerprint, salt, hash_name=table.hash_name)
    return len(table.longest_run(chain_keys(root, ids, table.block_size, table.hash_name)))


def restore(bench: Bench) -> None:
    """Time to the first token: computed, from the local cache, from a peer, from host memory; and what PCIe carried.

    What a restore or an import overwrites was not stored yet if it is asked for at once, and was if the engine rested before.
    """
    bench.row("host link", **_host_link(bench))
    with with_host_memory(bench) as (a, b, _):
        for tokens in bench.scale.restores:
            arms = {f"{kind}{rested}": kind for kind in ("restore", "import") for rested in ("", "_rested")}
            times: dict[str, list[float]] = {name: [] for name in ("cold", "hit", *arms)}
            copies: dict[str, list[Delivery]] = {name: [] for name in arms}
            stored = 0
            for turn in range(REPEATS):
                ids, seed = prompt(tokens, 10 * tokens + turn), 1000 * (tokens + turn)
                a.ask(ids, source="")
                for kind in ("cold", "hit"):
                    times[kind].append(b.ask(ids, source="").first_seconds)
                for place, (name, kind) in enumerate(arms.items()):
                    times["cold"] += lose(bench, b, ids, seed + 100 * place)
                    stored = max(stored, held(bench, TIER, ids))
                    if name != kind:
                        b.rest(REST_SECONDS)
                    cursor, _ = bench.directory.tables()[OWN].deliveries(1 << 62)
                    times[name].append(b.ask(ids, source=TIER if kind == "restore" else "replica-0").first_seconds)
                    copies[name].append(_delivery(bench, cursor))
            ms = {f"{kind}_ms": median(found) * 1e3 for kind, found in times.items()}
            rates = {f"{kind}_gb_per_s": median([d.import_bytes / max(1, d.import_ns) for d in found])
                     for kind, found in copies.items()}  # fmt: skip
            bench.row(
                "restore", tokens=tokens, **ms, **rates, stored_blocks=stored,
                restored_tokens=[d.peer_tokens for name in ("restore", "restore_rested") for d in copies[name]],
                copy_ms=median([d.import_ns / 1e6 for d in copies["restore"]]),
                copy_rested_ms=median([d.import_ns / 1e6 for d in copies["restore_rested"]]),
                cold_over_restore=ms["cold_ms"] / ms["restore_ms"],
                cold_over_restore_rested=ms["cold_ms"] / ms["restore_rested_ms"], repeats=REPEATS,
            )  # fmt: skip
        counted = bench.counters(TIER)
        bench.row("restore", **{name: counted[name] for name in STORE_COUNTERS},
                  failures=bench.counters()["fallbacks"])  # fmt: skip


def _host_link(bench: Bench) -> dict[str, float]:
    """Return GB/s between pinned memory and the GPU: of the copy engine, and of the gather by its number of programs."""
    if not bench.scale.devices[1]:
        return {}
    program = "from tests.gpu.host_memory import host_link; host_link()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def host_link() -> None:
    """Print what `_host_link` returns; in a process of its own, which ends with its memory."""
    import torch

    from transport.backends.gather import gather, plan, segments_of

    words, blocks, layers, count = 8192, 1024, 16, 512  # 64 KiB of a layer; 512 MiB a copy
    host = torch.empty((blocks, layers, words), dtype=torch.int64, pin_memory=True).random_()
    device = torch.empty((layers, blocks, words), dtype=torch.int64, device="cuda")
    flat = device.view(-1)[: host.numel()]
    segments = segments_of([(0, words * 8)] * layers)
    rows, pieces = plan(segments, [slice(0, count)])
    numbers = torch.from_numpy(rows.ravel()).cuda()
    chosen = torch.stack([torch.randperm(blocks)[:count] for _ in range(2)]).int().cuda()

    def table(base: int, layer: int, stride: int) -> Any:
        return torch.tensor([[base + n * layer, stride, words] for n in range(layers)]).t().contiguous().cuda()

    there, here = table(host.data_ptr(), words * 8, layers * words * 8), table(device.data_ptr(), blocks * words * 8, words * 8)
    found = {
        "engine_to_gpu": _rate(lambda: flat.copy_(host.view(-1), non_blocking=True), host.numel() * 8),
        "engine_to_host": _rate(lambda: host.view(-1).copy_(flat, non_blocking=True), host.numel() * 8),
    }
    for programs in (4, 8, 16, 32):
        for name, source, target in (("to_gpu", there, here), ("to_host", here, there)):
            copy = partial(gather, source, target, segments, numbers, pieces, chosen, programs)
            found[f"gather_{name}_{programs}"] = _rate(copy, count * layers * words * 8)
    print(json.dumps({name: round(rate, 1) for name, rate in found.items()}))


def _rate(copy: Any, size: int) -> float:
    """Return the best of some copies in GB/s."""
    import torch

    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        copy()
        torch.cuda.synchronize()
        best = max(best, size / (time.perf_counter() - began) / 1e9)
    return best


def interception(bench: Bench) -> None:
    """Time between steps of 64 running decodes while short prompts evict all that is cached, without and with host memory."""
    bench.tables.mkdir(mode=0o700, parents=True, exist_ok=True)
    kept = encode_kept(KeptMemories(bench.tables).keep(OWN, bench.scale.host_memory))
    small = (GRAPHS if bench.scale.devices[0] else {}) | {"num_gpu_blocks_override": bench.scale.churned_blocks}
    core = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with bench.pair(small | {"environment": core}, small | {"environment": core | {VARIABLE: kept}}) as engines:
        times: dict[str, list[float]] = {}
        computed: dict[str, int] = {}
        for turn in range(ROUNDS):
            for engine in engines if turn % 2 == 0 else reversed(engines):
                found, tokens = _decodes(bench, engine, turn)
                times.setdefault(engine.name, []).extend(found)
                computed[engine.name] = computed.get(engine.name, 0) + tokens
        for name, found in times.items():
            found.sort()
            bench.row(
                "interception", host_memory=name == OWN, p50_ms=statistics.median(found) * 1e3,
                p99_ms=found[int(len(found) * 0.99)] * 1e3, worst_ms=found[-1] * 1e3, steps=len(found),
                computed_tokens=computed[name], evictions=bench.counters(name)["evictions"],
            )  # fmt: skip
        counted = bench.counters(TIER)
        bench.row("interception", **{name: counted[name] for name in STORE_COUNTERS})


def _decodes(bench: Bench, engine: Replica, turn: int) -> tuple[list[float], int]:
    """Return the seconds of an engine's steps while its cache is full, and how many prompt tokens it computed meanwhile."""
    tokens = bench.scale.churned_tokens
    engine.load(DECODES, 64, 4000, 4 + turn)
    engine.churn(tokens, True)
    full, evicted = time.monotonic() + FULL_SECONDS_MAX, bench.counters(engine.name)["evictions"]
    while bench.counters(engine.name)["evictions"] < evicted + 20 * tokens // 16 and time.monotonic() < full:
        time.sleep(0.05)
    before = bench.counters(engine.name)["computed_tokens"]
    pulse = Pulse(bench.directory.tables()[engine.name])
    pulse.start()
    time.sleep(ROUND_SECONDS)
    steps = pulse.steps()
    after = bench.counters(engine.name)["computed_tokens"]
    engine.clear()
    return steps, after - before
