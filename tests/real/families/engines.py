"""Engines of one tiny model on the CPU, stepped by hand, that import from each other: no gateway, no server."""

import contextlib
import mmap
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tests.gpu.replica import Answer, Replica, prompt
from tests.real.leftovers import inodes_of, remove_files
from tests.tiny_models import WORDS_END, write_tiny_model
from transport.keys import chain_keys, root_key
from transport.table.group_look_up import GroupChain, Supply, supply
from transport.table.layout import HEADER, Layout
from transport.table.reader import TableReader

CHUNK = 512
"""Tokens of a step at most: longer prompts are computed in several."""
START_SECONDS_MAX = 300.0
ANSWER_SECONDS_MAX = 240.0
NOTHING: Mapping[str, str] = {}
CPU = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONHASHSEED": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Family:
    """Engines of one model by name, in a table directory of their own. `arguments` go to vllm.EngineArgs."""

    def __init__(self, folder: Path, family: str, model: Path | None = None, **arguments: Any) -> None:
        self.tables = folder / "tables"
        self.model = model or write_tiny_model(folder / "models", family, weights=True)
        chosen = {"skip_tokenizer_init": True, "max_model_len": 4096, "max_num_batched_tokens": CHUNK, "dtype": "float32"}
        chosen |= {"load_format": "dummy" if model else "auto"}
        self.exact = (chosen | arguments)["dtype"] == "float32"
        self._arguments = chosen | {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8} | arguments
        self._engines: dict[str, Replica] = {}

    def start(self, *names: str, environment: Mapping[str, str] = NOTHING, **arguments: Any) -> None:
        """Start engines side by side, with more in their `environment`, and wait for them."""
        with pytest_environment():
            given = (self.model, self.tables, 0, CPU | dict(environment))
            fresh = {name: Replica(name, "", *given, **self._arguments | arguments) for name in names}
        self._engines |= fresh
        for engine in fresh.values():
            engine.ready(START_SECONDS_MAX)

    def start_slowed(self, name: str) -> None:
        """Start an engine whose copies take their time."""
        config = {
            "kv_connector": "PeerKVConnector",
            "kv_connector_module_path": "tests.real.families.slowed_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"table_dir": str(self.tables), "replica": name},
        }
        self.start(name, kv_transfer_config=config)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.stop()

    def kill(self, name: str) -> None:
        """SIGKILL, and remove what Python's own end would have: semaphores in shared memory."""
        engine = self._engines[name]
        made = inodes_of(Path(f"/proc/{engine.process.pid}"))
        engine.kill()
        remove_files(made)

    def __getitem__(self, name: str) -> Replica:
        return self._engines[name]

    def ask(self, name: str, ids: list[int], **how: Any) -> Answer:
        """A greedy answer of eight tokens with log-probabilities."""
        return self._engines[name].ask(ids, 8, logprobs=True, seconds=ANSWER_SECONDS_MAX, **how)

    def table(self, name: str) -> TableReader:
        """The table of an engine, for the caller to close."""
        return TableReader(self.tables / f"{name}.table")

    def block(self) -> int:
        """Tokens of a block."""
        with closing(self.table("a")) as table:
            return table.block_size

    @contextlib.contextmanager
    def counting(self, name: str) -> Iterator[dict[str, int]]:
        """What an engine counts inside the block; filled in at its end."""
        with closing(self.table(name)) as table:
            before, counted = table.counters(), dict[str, int]()
            yield counted
            counted |= {counter: value - before[counter] for counter, value in table.counters().items()}

    def supply(self, name: str, ids: list[int]) -> Supply:
        """What an engine can supply of a prompt: all that can be used."""
        with closing(self.table(name)) as table:
            return supplied(table, ids)


def supplied(table: TableReader, ids: list[int]) -> Supply:
    """What a table's owner can supply of a prompt: all that can be used, or the test is not what it says."""
    keys = chain_keys(root_key(table.fingerprint), ids, table.block_size, table.hash_name)
    end = (len(ids) - 1) // table.block_size * table.block_size
    found = supply(table, GroupChain(table.groups, keys), 0, end)
    assert found is not None
    assert found.tokens == end
    return found


def tokens(length: int, seed: int) -> list[int]:
    """A prompt of random words, the same for the same seed."""
    return prompt(length, seed, WORDS_END)


@contextlib.contextmanager
def pytest_environment() -> Iterator[None]:
    """What the process that engines are forked from has to know before it imports vLLM."""
    before = {name: os.environ.get(name) for name in CPU}
    os.environ.update(CPU)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def scrambled(table: TableReader, group: int, block: int) -> Iterator[None]:
    """Overwrite what a block of a group holds in the owner's memory, while its table still vouches for it; then put it back."""
    (memory,) = table.memories
    layer = next(layer for layer in memory.layers if layer.group == group)
    handle = msgspec.json.decode(memory.regions[layer.region].handle)
    begin, end = layer.offset + block * layer.stride, layer.offset + block * layer.stride + layer.bytes
    with open(f"/proc/{handle['pid']}/fd/{handle['fd']}", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        held = mapped[begin:end]
        noise = np.random.default_rng(7).normal(size=layer.bytes // 4).astype(np.float32).tobytes()
        mapped[begin : begin + len(noise)] = noise
        try:
            yield
        finally:
            mapped[begin:end] = held


@contextlib.contextmanager
def moving_on(table: TableReader, path: Path, block: int) -> Iterator[None]:
    """Let a block's state move on all the time, as if its owner gave it away and filled it anew, over and over."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        *_, blocks, buckets, _, length = HEADER.unpack_from(mapped)
        place = Layout(blocks, buckets, length).states + 8 * block
        stop = threading.Event()

        def move() -> None:
            while not stop.is_set():
                (state,) = struct.unpack_from("<Q", mapped, place)
                struct.pack_into("<Q", mapped, place, state + 2)

        thread = threading.Thread(target=move)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
