"""Two engines whose host memory codes blocks of callers who accept loss: all others get what was computed, to the last bit."""

import random

import pytest
import torch

from engine.connector import worker
from engine.host_process.kept_memory import decode_kept, encode_kept
from tests.unit.engine.connector.test_in_vllms_scheduler import SIZE
from tests.unit.engine.connector.test_two_engines_with_host_memory import Working, serve_at_random
from tests.unit.engine.connector.test_two_gpu_engines_with_host_memory import WorkingGpu
from tests.unit.engine.keeper import Keeper
from tests.unit.transport.backends.simulated_gpu import WRITER, simulated
from transport.table.quality import CODED, IN_CODE, LOSSY, QUALITY, is_lossy_salt, lossy_salt
from transport.table.reader import TableReader
from transport.table.tiers import host_memory_of

HEADS, WIDTH = 2, 32
REGION = 300 * 1024
"""24 blocks as they are, or 49 coded ones."""
STRIDES = f"torch.bfloat16 {(HEADS, SIZE, 2 * WIDTH)} {(2 * HEADS * SIZE * WIDTH, 2 * SIZE * WIDTH, 2 * WIDTH, 1)}"
FIELDS = {"kv dtype": "auto", "strides": STRIDES}
SALTS = ("s", lossy_salt("s"))


class Lossy:
    """Blocks of numbers that are coded, and what callers may be served with."""

    shape = (HEADS, SIZE, 2 * WIDTH)
    dtype = torch.bfloat16
    coded = 0

    def _compare(self, found, wanted, salt) -> None:
        if not is_lossy_salt(salt):
            assert torch.equal(found, wanted)
            return
        assert torch.allclose(found.float(), wanted.float(), atol=1 / 127)
        self.coded += not torch.equal(found, wanted)


class LossyCpu(Lossy, Working):
    lossy = FIELDS | {"attention backend": "CPU_ATTN", "cpu layout": "vec"}


class LossyGpu(Lossy, WorkingGpu):
    lossy = FIELDS | {"attention backend": "FLASH_ATTN"}


def kept_memories(path):
    (path / "tables").mkdir(mode=0o700)
    keeper = Keeper(path / "tables")
    return keeper, [(name, decode_kept(encode_kept(keeper.keep(name, REGION)))) for name in ("a", "b")]


def close(engines):
    for engine in engines:
        engine.worker.close()
        engine.scheduler.connector.shutdown()


@pytest.fixture
def cpu_engines(tmp_path, monkeypatch):
    _keeper, kept = kept_memories(tmp_path)
    made = [LossyCpu(tmp_path, name, each, monkeypatch) for name, each in kept]
    yield made
    close(made)


@pytest.fixture
def gpu_engines(tmp_path, monkeypatch):
    _keeper, kept = kept_memories(tmp_path)
    with simulated(monkeypatch, 1) as (gpu, cuda_ipc):
        monkeypatch.setattr(worker, "_transport", cuda_ipc.CudaIpcTransport)
        monkeypatch.setattr(f"{WRITER}.LAUNCH_BLOCKS_MIN", 3)
        made = [LossyGpu(gpu, tmp_path, name, each, monkeypatch) for name, each in kept]
        yield made
        close(made)
        assert not gpu.pinned


@pytest.mark.parametrize(("engines", "requests"), [("cpu_engines", 120), ("gpu_engines", 40)])
def test_who_accepts_loss_gets_what_is_close_and_all_others_what_was_computed(engines, requests, request, tmp_path):
    made = request.getfixturevalue(engines)
    serve_at_random(made, random.Random(engines), requests, SALTS)
    for engine in made:
        engine.run()
    assert sum(engine.table.counters()["tier_tokens_host_memory"] for engine in made) > 5 * SIZE
    assert sum(engine.coded for engine in made) > 5
    seen = set()
    for engine in made:
        assert engine.table.counters()["table_errors"] == 0
        tier = TableReader(tmp_path / "tables" / f"{host_memory_of(engine.table.name)}.table")
        assert tier.counters()["evictions"] > 0
        for table in (tier, engine.table):
            bits = {int(state) & QUALITY for state in table.states() if not state & 1}
            assert not any(each & IN_CODE and each & (LOSSY | CODED) != LOSSY | CODED for each in bits)
            seen |= {(table is tier, bool(each & IN_CODE), bool(each & CODED)) for each in bits}
    assert {(True, True, True), (True, False, False)} <= seen
    assert (False, True, True) not in seen  # an engine's own blocks lie as they are
