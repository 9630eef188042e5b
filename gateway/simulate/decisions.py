"""What one decision costs as the fleet grows: real block tables in shared memory, read and weighed as for a request.

The simulator's own tables are a dictionary, so its microseconds leave out what the gateway spends on reading real ones.
"""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.box import MARKDOWN
from rich.table import Table

from gateway.costs import CostModel, ModelKey
from gateway.load import FleetLoad
from gateway.registry import Registry
from gateway.simulate.report import wide_console
from gateway.steering import Candidate, PromptView, steer
from transport.directory import TableDirectory
from transport.keys import chain_keys, root_key
from transport.table import TableReader
from transport.table_layout import Description
from transport.table_writer import TableWriter

BLOCK_TOKENS = 16
SYSTEM_BLOCKS = 32
PROMPTS = (16_384, 131_072)
HOLDERS = 8  # replicas that hold half of the prompt; one more holds all of it
REPEATS = 15
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Decision:
    """Median seconds for a prompt: looking up (hashing its blocks and reading every table), and all else."""

    replicas: int
    prompt_tokens: int
    look_up_seconds: float
    weigh_seconds: float


def time_decisions(replicas: int, prompt_tokens: int, repeats: int = REPEATS) -> Decision:
    """Time decisions over `replicas` tables of this process's own. Raises OSError without room for them."""
    ids = list(range(prompt_tokens))
    with _fleet(replicas, ids) as directory:
        registry, costs, load = Registry(TableDirectory(directory)), CostModel(), FleetLoad()
        registry.look_up(ids)
        looked, weighed = [], []
        for turn in range(repeats):
            began = time.perf_counter()
            found = registry.look_up(ids)
            between = time.perf_counter()
            tables = registry.tables()
            for name, table in tables.items():
                load.heard(name, table.load())
            candidates = [
                Candidate(name, holding.tokens, load.load(name, began), holding.exchanges_with, ModelKey("cuda"))
                for name, holding in found.holdings.items()
            ]
            steer(PromptView(prompt_tokens, block_size=BLOCK_TOKENS), candidates, costs, began, turn)
            looked.append(between - began)
            weighed.append(time.perf_counter() - between)
    return Decision(replicas, prompt_tokens, median(looked), median(weighed))


@contextmanager
def _fleet(replicas: int, ids: Sequence[int]) -> Iterator[Path]:
    """Tables: every replica holds the first blocks of the prompt, some half of it, one all."""
    blocks = len(ids) // BLOCK_TOKENS
    with ExitStack() as stack:
        parent = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peerkv-decisions-", dir=parent)))
        for number in range(replicas):
            about = Description(f"replica-{number}", os.getpid(), "xxh3_128", "cuda_ipc", "ok", {"weights": "one"}, ())
            held = blocks if number == 0 else blocks // 2 if number <= HOLDERS else min(SYSTEM_BLOCKS, blocks)
            writer = TableWriter(directory, about, BLOCK_TOKENS, held)
            stack.callback(writer.close)
            if number == 0:
                reader = TableReader(writer.path)
                keys = chain_keys(root_key(reader.fingerprint, "", "", reader.hash_name), ids, BLOCK_TOKENS, reader.hash_name)
                reader.close()
            writer.publish(range(held), keys[:held])
        yield directory


def print_decisions(fleets: Sequence[int]) -> None:
    """Time decisions for each size of the fleet and print a table."""
    table = Table(title="one decision, median", title_justify="left", box=MARKDOWN)
    for name in ("replicas", "prompt tokens", "look-up ms", "weighing ms", "in all ms"):
        table.add_column(name, justify="right")
    for replicas in fleets:
        for tokens in PROMPTS:
            took = time_decisions(replicas, tokens)
            both = took.look_up_seconds + took.weigh_seconds
            table.add_row(
                str(replicas),
                str(tokens),
                f"{took.look_up_seconds * 1e3:.2f}",
                f"{took.weigh_seconds * 1e3:.2f}",
                f"{both * 1e3:.2f}",
            )
    wide_console().print(table)
