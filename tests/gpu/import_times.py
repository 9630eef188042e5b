"""What an import takes, beside a hit and a cold prompt, and what its owner and importer notice of it."""

import random
import statistics
import subprocess
import sys
import threading
import time
from itertools import pairwise
from typing import Any

from tests.gpu.engine_pair import GRAPHS, Bench
from tests.gpu.replica import Replica, median, prompt
from transport.table.deliveries import Delivery
from transport.table.reader import TableReader

DECODES = 64
ROUND_SECONDS = 4.0


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

    As the engine's client sees it, and (`engine_*`) as the scheduler does, from the request's arrival there. Before each the
    engine serves a hit of another prompt: one that idled while the owner computed takes longer, whatever it is asked.
    """
    a, b = pair
    rng = random.Random(5)
    for tokens in bench.scale.sizes:
        times: dict[str, list[float]] = {"cold": [], "local": [], "import": []}
        inside: dict[str, list[float]] = {"cold": [], "local": [], "import": []}
        imports: list[Delivery] = []
        other = prompt(tokens, 10 * tokens + 9999)
        for turn in range(bench.scale.repeats):
            ids, fresh = prompt(tokens, 10 * tokens + turn), prompt(tokens, 10 * tokens + turn + 5000)
            a.ask(ids)
            for first in rng.sample(("import", "cold"), 2):
                for kind in ("import", "local") if first == "import" else ("cold",):
                    b.ask(other, source="")
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
