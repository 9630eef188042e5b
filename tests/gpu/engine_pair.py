"""Two engines of one model, and what is measured of them."""

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.gpu.replica import Replica, prompt, write_model
from transport.table.directory import TableDirectory

TURN_SECONDS_MAX = 500.0
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
    restores: tuple[int, ...] = (8192, 32768)
    host_memory: int = 24 << 30
    churned_blocks: int = 6000
    churned_tokens: int = 512
    connectors: tuple[str, ...] = ()


class Bench:
    """Collects rows and prints them as they come."""

    def __init__(self, scale: Scale, tables: Path, turns: Path | None = None) -> None:
        self._turns = turns
        self.scale = scale
        self.tables = tables
        self.directory = TableDirectory(tables)
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def row(self, section: str, **values: Any) -> None:
        rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}
        self.rows.setdefault(section, []).append(rounded)
        print(f"{section}: " + ", ".join(f"{k} {v}" for k, v in rounded.items()), flush=True)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Measure in here: of benches that were given the same file of turns, and start together, one at a time does."""
        if self._turns is None:
            yield
            return
        with self._turns.open("a") as file:
            until = time.monotonic() + TURN_SECONDS_MAX
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise TimeoutError(f"no turn in {TURN_SECONDS_MAX:g} s") from None
                    time.sleep(0.2)
            yield

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
            with self.turn():
                yield [first, second]
        finally:
            first.stop()
            second.stop()

    def counters(self, name: str = "replica-1") -> dict[str, int]:
        return self.directory.tables()[name].counters()


def with_pair(*parts: Callable[[Bench, list[Replica]], None]) -> Callable[[Bench], None]:
    def run(bench: Bench) -> None:
        with bench.pair() as pair:
            for part in parts:
                part(bench, pair)

    return run


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
        model,
        devices=("", ""),
        exact=(256, 600),
        sizes=(256, 600),
        repeats=2,
        busy=(300,),
        churn=512,
        pull=512,
        prefixes=4,
        importer_blocks=1600,
        race_imports=50,
        churned_imports=24,
        kills=3,
        programs=0,
        arguments=arguments,
        restores=(256, 600),
        host_memory=64 << 20,
        churned_blocks=600,
        churned_tokens=512,
    )
