"""Two engines of one model, and what is measured of them."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.gpu.replica import Replica, prompt, write_model
from transport.table.directory import TableDirectory

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
        model, ("", ""), (256, 600), (256, 600), 2, (300,), 512, 512, 4, 1600, 50, 24, 3, 0, arguments
    )  # fmt: skip
