"""The connector inside vLLM's own scheduler, under both model runners, with and without a step ahead."""

import json
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from engine.connector import ahead
from engine.connector.step_messages import Handshake, StepMetadata, WorkerReport
from engine.host_process.kept_memory import VARIABLE, encode_kept
from engine.tiers.slots import cut
from tests.unit.engine.keeper import Keeper
from transport.keys import chain_keys, root_key
from transport.table.deliveries import EngineLoad
from transport.table.layout import Layer, Memory
from transport.table.reader import TableReader

SIZE, BLOCKS, BATCH = 16, 24, 96
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "dtype": "float32",
    "max_position_embeddings": 256,
}


HANDSHAKE = Handshake(Memory(0, "shared_memory", (), ()), "ok", {})


class Engine:
    """vLLM's scheduler and a worker that samples the token 7, always. `ahead` steps are scheduled before one is reported."""

    def __init__(self, path, runner: str, ahead: int, *, name: str = "replica-0", handshake: Handshake = HANDSHAKE) -> None:
        model = path / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(LLAMA))
        (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        config = VllmConfig(
            model_config=ModelConfig(str(model), skip_tokenizer_init=True, dtype="float32", seed=0, max_model_len=256),
            cache_config=CacheConfig(block_size=SIZE, enable_prefix_caching=True),
            scheduler_config=SchedulerConfig(
                max_num_seqs=8,
                max_num_batched_tokens=BATCH,
                max_model_len=256,
                is_encoder_decoder=False,
                async_scheduling=ahead > 0,
            ),
            device_config=DeviceConfig("cpu"),
            kv_transfer_config=self.transfer_config(
                kv_connector="PeerKVConnector",
                kv_connector_module_path="engine.connector",
                kv_role="kv_both",
                kv_connector_extra_config={"table_dir": str(path / "tables"), "replica": name, "pin_share_max": 0.5},
            ),
        )
        config.cache_config.num_gpu_blocks = BLOCKS
        spec = FullAttentionSpec(block_size=SIZE, num_kv_heads=2, head_size=32, dtype=torch.float32)
        kv = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        kind = AsyncScheduler if ahead else Scheduler
        self.ahead = ahead
        self.scheduler = kind(
            vllm_config=config,
            kv_cache_config=kv,
            structured_output_manager=StructuredOutputManager(config),
            block_size=SIZE,
        )
        self.scheduler.use_v2_model_runner = runner == "v2"  # without Triton the configuration refuses it
        self.pool = self.scheduler.kv_cache_manager.block_pool
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(SIZE, sha256)
        self.tables = path / "tables"
        self.handshake = handshake
        self.tell_of_memory()
        self.table = TableReader(self.tables / f"{name}.table")
        self.under_way: list = []
        self.preempted = 0

    def transfer_config(self, **ours) -> KVTransferConfig:
        """What vLLM is told of connectors: ours alone."""
        return KVTransferConfig(**ours)

    def tell_of_memory(self) -> None:
        """As vLLM does at its start, and when it woke up."""
        self.scheduler.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): self.handshake})

    def add(self, name: str, first: int, tokens: int, answer: int, **hint) -> Request:
        return self.add_ids(name, list(range(first, first + tokens)), answer, **hint)

    def add_ids(self, name: str, ids: list[int], answer: int, *, salt: str | None = None, **hint) -> Request:
        params = SamplingParams(max_tokens=answer, ignore_eos=True, extra_args={"kv_transfer_params": {"peerkv": hint}})
        request = Request(name, ids, params, None, block_hasher=self.hasher, cache_salt=salt)
        self.scheduler.add_request(request)
        return request

    def step(self) -> None:
        output = self.scheduler.schedule()
        self.preempted += len(output.preempted_req_ids or ())
        self.under_way.append(output)
        while len(self.under_way) > self.ahead:
            self._report(self.under_way.pop(0))

    def _report(self, output) -> None:
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            request = self.scheduler.requests.get(name)
            partial = request is not None and output_end(output, name) < request.num_prompt_tokens
            sampled.append([] if partial else [7])
        index = {name: place for place, name in enumerate(names)}
        told = self._tell(output.kv_connector_metadata)
        self.scheduler.update_from_output(output, ModelRunnerOutput(names, index, sampled, kv_connector_output=told))

    def _tell(self, step: StepMetadata) -> KVConnectorOutput:
        """What the connector's worker says of a step."""
        return KVConnectorOutput(
            kv_connector_worker_meta=WorkerReport(step.step, copied={store.slot: 1 for store in step.stores.begun})
        )

    def run(self, steps_max: int = 400) -> None:
        """Step until nothing is left to do."""
        for _ in range(steps_max):
            if not self.scheduler.has_requests() and not self.under_way:
                return
            if self.scheduler.has_requests():
                self.step()
            else:
                self._report(self.under_way.pop(0))
        raise AssertionError(f"not done within {steps_max} steps")

    @property
    def records(self) -> dict[int, object]:
        found = self.table.deliveries(0)[1]
        tags = [each.tag for each in found]
        assert len(set(tags)) == len(tags)
        return {each.tag: each for each in found}


def output_end(output, name: str) -> int:
    """How many tokens of a request are computed once a step is done."""
    starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    cached = output.scheduled_cached_reqs
    starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return starts[name] + output.num_scheduled_tokens[name]


@pytest.fixture(params=[("v1", 0), ("v1", 1), ("v2", 1)], ids=["v1", "v1-ahead", "v2-ahead"])
def engine(request, tmp_path) -> Iterator[Engine]:
    made = Engine(tmp_path, *request.param)
    yield made
    made.table.close()
    made.scheduler.connector.shutdown()


def test_a_request_leaves_one_record_and_an_idle_engine_no_load(engine):
    engine.add("a", 10, 150, 20, tag=1, source="")
    assert engine.table.load() == EngineLoad(waiting_requests=1, waiting_tokens=150)
    engine.run()
    engine.add("b", 10, 150, 1, tag=2, source="")
    engine.run()
    cold, local = engine.records[1], engine.records[2]
    assert (cold.local_tokens, cold.computed_tokens) == (0, 150)
    assert (local.local_tokens, local.computed_tokens) == (144, 6)
    for found in (cold, local):
        assert 0 < found.arrived_ns < found.asked_ns < found.scheduled_ns < found.first_token_ns
    assert engine.table.load() == EngineLoad()


def test_requests_that_are_preempted_and_resumed_leave_one_record_each(engine):
    for number in (1, 2, 3, 4):
        engine.add(f"r{number}", 100 * number, 100, 70, tag=number, source="")
    engine.run()
    assert engine.preempted > 0
    assert set(engine.records) == {1, 2, 3, 4}
    for found in engine.records.values():
        assert found.first_token_ns > found.scheduled_ns > 0
        assert (found.local_tokens, found.computed_tokens) == (0, 100)
    assert engine.table.load() == EngineLoad()


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_request_that_is_aborted_leaves_one_record_whenever_that_comes(engine, steps):
    engine.add("a", 10, 150, 20, tag=1, source="")
    for _ in range(steps):
        engine.step()
    first_token = engine.scheduler.requests["a"].num_output_tokens > 0
    engine.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    engine.run()
    assert (engine.records[1].first_token_ns > 0) is first_token
    assert engine.table.load() == EngineLoad()


def test_a_pinned_prompt_outlives_what_uses_up_the_cache_and_a_reset_ends_it(engine):
    engine.add("a", 10, 64, 2, tag=1, source="", pin={"id": 1, "seconds": 3600})
    engine.add("b", 500, 64, 2, tag=2, source="")
    engine.run()
    assert engine.table.load().pinned_blocks == 4
    for number in range(3, 8):
        engine.add(f"r{number}", 100 * number, 200, 2, tag=number, source="")
        engine.run()
    engine.add("again", 10, 65, 2, tag=20, source="")
    engine.add("other", 500, 65, 2, tag=21, source="")
    engine.run()
    assert (engine.records[20].local_tokens, engine.records[21].local_tokens) == (64, 0)
    assert engine.scheduler.reset_prefix_cache(reset_connector=True) is True
    assert engine.table.load() == EngineLoad()
    assert engine.pool.get_num_free_blocks() == BLOCKS - 1


def test_a_reset_that_preempts_everybody_succeeds_though_there_are_pins(engine):
    """As vLLM does when it is paused or put to sleep: it raises if a block is in use after that."""
    engine.add("a", 10, 64, 60, tag=1, source="", pin={"id": 1, "seconds": 3600})
    for _ in range(4):
        engine.step()
    assert engine.table.load().pinned_blocks == 4
    if engine.ahead:
        engine._report(engine.under_way.pop(0))  # as vLLM does first: blocks that a step writes are not free
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True) is True
    engine.run()
    assert set(engine.records) == {1}
    assert engine.pool.get_num_free_blocks() == BLOCKS - 1


def test_pins_never_keep_a_large_request_from_running(engine):
    engine.add("a", 10, 176, 2, tag=1, source="", pin={"id": 1, "seconds": 3600})
    engine.run()
    assert engine.table.load().pinned_blocks == 11
    engine.add("large", 300, 220, 10, tag=2, source="")
    engine.run()
    assert engine.records[2].computed_tokens == 220
    assert engine.table.load() == EngineLoad()


def test_an_engine_that_slept_begins_a_new_epoch_with_nothing_on_offer(engine):
    engine.add("before", 100, 5 * SIZE, 2, pin={"id": 1, "seconds": 60})
    engine.run()
    assert engine.table.cached_blocks() > 0
    free = engine.pool.get_num_free_blocks()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)  # vLLM's sleep begins so
    assert engine.table.cached_blocks() == 0
    engine.tell_of_memory()
    assert not engine.table.alive()
    with closing(TableReader(engine.tables / "replica-0.table")) as table:
        assert table.epoch > engine.table.epoch
        assert (table.alive(), table.cached_blocks()) == (True, 0)
        engine.add("after", 100, 5 * SIZE, 2)
        engine.run()
        assert table.cached_blocks() == 5
    assert engine.pool.get_num_free_blocks() > free  # nothing is pinned any more


@pytest.fixture(params=[("v1", 0), ("v2", 1)], ids=["v1", "v2-ahead"])
def storing(request, tmp_path, monkeypatch) -> Iterator[Engine]:
    """An engine with host memory for 64 blocks."""
    (tmp_path / "tables").mkdir(mode=0o700)
    keeper = Keeper(tmp_path / "tables")
    kept = keeper.keep("replica-0", 1 << 16)
    monkeypatch.setenv(VARIABLE, encode_kept(kept))
    slots = cut(kept.region, Memory(0, "shared_memory", (), (Layer(0, 0, 960, 960),)), 1)
    made = Engine(tmp_path, *request.param, handshake=Handshake(HANDSHAKE.memory, "ok", {}, slots))
    yield made
    made.scheduler.connector.shutdown()


def test_every_block_that_vllm_gives_away_was_stored(storing):
    prompts = {name: list(range(first, first + 130)) for name, first in (("a", 0), ("b", 200), ("c", 400), ("d", 600))}
    for name, ids in prompts.items():
        storing.add(name, ids[0], len(ids), 3)
        storing.run()
    with closing(TableReader(storing.tables / "replica-0.host-memory.table")) as tier:
        here, there = (
            [len(table.longest_run(chain_keys(root_key(table.fingerprint), ids, SIZE))) for ids in prompts.values()]
            for table in (storing.table, tier)
        )
        lost = storing.table.counters()["evictions"]
        assert lost > 8
        assert tier.cached_blocks() >= lost
        for ids, held in zip(prompts.values(), here, strict=True):
            keys = chain_keys(root_key(tier.fingerprint), ids, SIZE)
            assert tier.look_up(keys[held:])[0].all()  # what is here no longer is there
        assert there[0] == 8
        assert storing.scheduler.connector.reset_cache()
        assert tier.cached_blocks() == 0


def test_the_step_with_which_vllm_becomes_idle_stores_what_it_will_give_away_next(storing, monkeypatch):
    """Sixteen blocks: a quarter of the tier. A prompt that takes as many has none of them stored, and waits for none."""
    monkeypatch.setattr(ahead, "AHEAD_BLOCKS_MIN", 1)
    monkeypatch.setattr(ahead, "AHEAD_BLOCKS_MAX", 1)
    made = []
    build = type(storing.scheduler.connector).build_connector_meta

    def built(connector, output):
        made.append((output.total_num_scheduled_tokens, build(connector, output)))
        return made[-1][1]

    monkeypatch.setattr(type(storing.scheduler.connector), "build_connector_meta", built)
    for name, first in (("a", 0), ("b", 200), ("c", 400)):
        storing.add(name, first, 130, 3)
        storing.run()
    assert not storing.scheduler.has_requests()
    tokens, meta = made[-1]
    assert (tokens, meta.stores.at_once) == (0, True)
    with closing(TableReader(storing.tables / "replica-0.host-memory.table")) as tier:
        before = tier.counters()
        assert 8 <= len(meta.stores.begun) <= before["tier_ahead_blocks"] <= before["published_blocks"]
        lost = storing.table.counters()["evictions"]
        made.clear()
        storing.add("d", 600, 15 * SIZE - 4, 2)
        storing.run()
        assert storing.table.counters()["evictions"] - lost > 8
        assert not any(meta.stores.overwritten for _, meta in made[:1])
        after = tier.counters()
        assert (
            after["published_blocks"] - before["published_blocks"] == after["tier_ahead_blocks"] - before["tier_ahead_blocks"]
        )


def test_on_gpus_the_table_of_host_memory_is_of_the_engines_kind_and_its_memory_of_another(tmp_path, monkeypatch):
    (tmp_path / "tables").mkdir(mode=0o700)
    keeper = Keeper(tmp_path / "tables")
    kept = keeper.keep("replica-0", 1 << 16)
    monkeypatch.setenv(VARIABLE, encode_kept(kept))
    memory = Memory(0, "cuda_ipc", (), (Layer(0, 0, 1024, 1024),))
    slots = cut(kept.region, memory, 1)
    made = Engine(tmp_path, "v1", 0, handshake=Handshake(memory, "ok", {}, slots))
    with closing(TableReader(made.tables / "replica-0.host-memory.table")) as tier:
        assert (made.table.transport, tier.transport, tier.memories[0].transport) == ("cuda_ipc", "cuda_ipc", "shared_memory")
        assert tier.memories[0].checksums is None
        assert (tier.num_blocks, tier.slot_bytes()) == (64, 1024)  # none of the room is for checksums
        assert made.table.slot_bytes() == 0
    made.scheduler.connector.shutdown()


def test_a_table_that_is_made_anew_as_after_a_sleep_goes_on_with_what_is_stored(storing):
    for name, first in (("a", 0), ("b", 200), ("c", 400)):
        storing.add(name, first, 130, 3)
        storing.run()
    with closing(TableReader(storing.tables / "replica-0.host-memory.table")) as tier:
        stored = tier.cached_blocks()
        assert stored > 8
        storing.tell_of_memory()
        assert (tier.cached_blocks(), tier.alive()) == (stored, True)
        for name, first in (("d", 600), ("e", 700), ("f", 800)):  # what was computed before is on offer no more
            storing.add(name, first, 130, 3)
            storing.run()
        assert tier.cached_blocks() > stored
