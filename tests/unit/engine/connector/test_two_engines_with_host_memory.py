"""Two of vLLM's schedulers with the workers' half on real memory, always evicting: every block that is used is right.

The model is a stand-in that writes into each block what follows from the tokens up to its end, and looks before each step at
every block of the prefix that vLLM takes for computed.
"""

import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from engine.connector.worker import WorkerHalf
from engine.host_process.kept_memory import VARIABLE, decode_kept, encode_kept
from engine.tiers.slot_writer import SlotWriter
from tests.unit.engine.connector.test_in_vllms_scheduler import BLOCKS, SIZE, Engine, output_end
from tests.unit.engine.keeper import Keeper
from transport.keys import chain_keys
from transport.table.reader import TableReader
from transport.table.tiers import host_memory_of, tier_kind

LAYERS = 3
ROOT = b"r" * 16
REQUESTS = 120


class Working(Engine):
    """An engine with memory."""

    shape: tuple[int, ...] = (2, SIZE, 2)
    dtype = torch.float32
    lossy: dict[str, str] | None = None

    def __init__(self, path, name: str, kept, monkeypatch) -> None:
        monkeypatch.setenv(VARIABLE, encode_kept(kept))
        self.layers = {f"layer.{i}": torch.zeros(BLOCKS, *self.shape, dtype=self.dtype) for i in range(LAYERS)}
        self.worker = WorkerHalf(path / "tables", name, 0, kept)
        self.worker.register(self.layers, BLOCKS, lossy=self.lossy)
        super().__init__(path, "v1", 0, name=name, handshake=self.worker.handshake({}))
        self.blocks: dict[str, list[int]] = {}
        self.checked = 0

    def _report(self, output) -> None:
        meta = output.kv_connector_metadata
        self.worker.store(meta)
        self._compute(output)
        self.worker.start(meta)
        ended = self.worker.poll()
        told = KVConnectorOutput(
            finished_recving=ended or None,
            invalid_block_ids=self.worker.take_load_errors(),
            kv_connector_worker_meta=self.worker.take_report(),
        )
        self._finish()
        names = list(output.num_scheduled_tokens)
        sampled = [[] if output_end(output, name) < self.scheduler.requests[name].num_prompt_tokens else [7] for name in names]
        index = {name: place for place, name in enumerate(names)}
        self.scheduler.update_from_output(output, ModelRunnerOutput(names, index, sampled, kv_connector_output=told))

    def _enqueue(self, kernel) -> None:
        kernel()

    def _finish(self) -> None:
        """Wait for all that was enqueued."""

    def _compute(self, output) -> None:
        """Look at what counts as computed, then write what this step computes."""
        starts = {}
        for new in output.scheduled_new_reqs:
            self.blocks[new.req_id] = list(new.block_ids[0])
            starts[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for name, added, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            if name in cached.resumed_req_ids:
                self.blocks[name] = []
            self.blocks[name] += added[0] if added else []
            starts[name] = computed
        for name, count in output.num_scheduled_tokens.items():
            keys = chain_keys(ROOT, self.scheduler.requests[name].all_token_ids, SIZE)
            whole, end = starts[name] // SIZE, (starts[name] + count) // SIZE
            blocks = list(self.blocks[name])
            for place in range(end):
                salt = self.scheduler.requests[name].cache_salt
                self._enqueue(partial(self._touch, blocks[place], keys[place], place >= whole, salt))

    def _touch(self, block: int, key, computed: bool, salt: str | None) -> None:
        """Write a block that is computed, look at one that was."""
        for number, layer in enumerate(self.layers.values()):
            if computed:
                layer[block] = self._content(key, number)
            else:
                self._compare(layer[block], self._content(key, number), salt)
        self.checked += not computed

    def _compare(self, found: torch.Tensor, wanted: torch.Tensor, salt: str | None) -> None:
        assert torch.equal(found, wanted)

    def _content(self, key, layer: int) -> torch.Tensor:
        """What a layer holds for a block."""
        generator = torch.Generator().manual_seed(int(key[0] >> np.uint64(2)) + layer)
        return torch.rand(self.shape, generator=generator).to(self.dtype)


def mixed_imports(engine: Engine) -> int:
    """How many requests imported from several sources; what the records say of each kind of source is what was counted."""
    records, counters = engine.table.deliveries(0)[1], engine.table.counters()
    came: Counter[str | None] = Counter()
    for record in records:
        for each in record.sources():
            came[tier_kind(each.source)] += each.tokens
    peers = counters["peer_tokens_shared_memory"] + counters["peer_tokens_cuda_ipc"]
    assert (came["host_memory"], came[None]) == (counters["tier_tokens_host_memory"], peers)
    assert all(record.prompt_tokens == record.local_tokens + record.peer_tokens + record.computed_tokens for record in records)
    return sum(bool(record.further) for record in records)


def serve_at_random(engines, chance: random.Random, requests: int, salts=(None,)) -> None:
    """Have engines serve requests whose prompts begin alike; the last of them are not done yet."""
    prefixes = [[chance.randrange(900) for _ in range(chance.randrange(4, 10) * SIZE)] for _ in range(9)]
    for number in range(requests):
        engine, prefix = chance.choice(engines), chance.choice(prefixes)
        ids = prefix[: chance.randrange(SIZE, len(prefix))] + [chance.randrange(900) for _ in range(chance.randrange(1, 40))]
        engine.add_ids(f"r{number}", ids, chance.randrange(1, 20), salt=chance.choice(salts))
        for _ in range(chance.randrange(12)):
            for each in engines:
                if each.scheduler.has_requests():
                    each.step()


@pytest.fixture
def engines(tmp_path, monkeypatch):
    (tmp_path / "tables").mkdir(mode=0o700)
    keeper = Keeper(tmp_path / "tables")
    made = []
    for name in ("a", "b"):
        kept = decode_kept(encode_kept(keeper.keep(name, 40 * 1024)))
        made.append(Working(tmp_path, name, kept, monkeypatch))
    yield made
    for engine in made:
        engine.worker.close()
        engine.scheduler.connector.shutdown()


@pytest.mark.parametrize("thread", ["copies", "never comes to it"])
def test_whatever_is_restored_is_what_was_computed(engines, tmp_path, thread, monkeypatch):
    if thread != "copies":  # then each step has to wait for what it overwrites
        monkeypatch.setattr(SlotWriter, "_run", lambda self: None)
    serve_at_random(engines, random.Random(thread), REQUESTS)
    mixed = 0
    for engine, other in (engines, engines[::-1]):
        engine.run()
        assert host_memory_of(other.table.name) in {peer.name for peer in engine.table.peers()}
        counters = engine.table.counters()
        assert counters["requests"] > REQUESTS // 4
        assert counters["tier_tokens_host_memory"] > 10 * SIZE
        assert counters["table_errors"] == 0
        assert engine.checked > REQUESTS
        mixed += mixed_imports(engine)
        tier = TableReader(tmp_path / "tables" / f"{host_memory_of(engine.table.name)}.table")
        assert tier.counters()["evictions"] > 0  # its slots were used over and over
        assert tier.cached_blocks() <= tier.num_blocks
    assert mixed > 0
