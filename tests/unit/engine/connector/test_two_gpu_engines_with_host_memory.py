"""Two of vLLM's schedulers with the workers' half on a simulated GPU, always evicting: every block that is used is right.

The GPU runs its streams in any order that their events allow. As on a real one, the workers report a step when it is enqueued,
and the scheduler hears of it when it is done.
"""

import random

import pytest

from engine.connector import ahead, worker
from engine.host_process.kept_memory import decode_kept, encode_kept
from tests.real.fleet import until
from tests.unit.engine.connector.test_in_vllms_scheduler import BLOCKS, SIZE
from tests.unit.engine.connector.test_two_engines_with_host_memory import Working, mixed_imports, serve_at_random
from tests.unit.engine.keeper import Keeper
from tests.unit.transport.backends.simulated_gpu import WRITER, Stream, simulated
from transport.table.reader import TableReader
from transport.table.tiers import host_memory_of

REQUESTS = 40


class WorkingGpu(Working):
    """An engine whose kernels run when the simulated GPU comes to them."""

    def __init__(self, gpu, *given) -> None:
        self.gpu = gpu
        self.stream = Stream(gpu)
        super().__init__(*given)
        until(self.worker._slot_writer._slots.done, 20, "host memory is open", 0.001)

    def step(self, *given, **about):
        self.gpu.compute = self.stream
        self.gpu.some(3)
        return super().step(*given, **about)

    def _enqueue(self, kernel) -> None:
        self.stream.enqueue(kernel)

    def _finish(self) -> None:
        self.stream.synchronize()


@pytest.fixture(params=[64, 1], ids=["stored ahead", "stored when overwritten"])
def engines(request, tmp_path, monkeypatch):
    (tmp_path / "tables").mkdir(mode=0o700)
    keeper = Keeper(tmp_path / "tables")
    made = []
    for bound in ("AHEAD_BLOCKS_MIN", "AHEAD_BLOCKS_MAX", "FAR_BLOCKS_MAX"):
        monkeypatch.setattr(ahead, bound, request.param)
    monkeypatch.setattr(ahead, "CALM_STEPS", 2)
    with simulated(monkeypatch, request.param) as (gpu, cuda_ipc):
        monkeypatch.setattr(worker, "_transport", cuda_ipc.CudaIpcTransport)
        monkeypatch.setattr(f"{WRITER}.LAUNCH_BLOCKS_MIN", 3)
        monkeypatch.setattr(cuda_ipc, "PART_BLOCKS_MIN", 2)
        monkeypatch.setattr(f"{WRITER}.LAUNCH_BLOCKS_MAX", 3)
        monkeypatch.setattr(cuda_ipc, "PIECE_BLOCKS", 2)
        for name in ("a", "b"):
            kept = decode_kept(encode_kept(keeper.keep(name, 40 * 1024)))
            made.append(WorkingGpu(gpu, tmp_path, name, kept, monkeypatch))
        yield made
        for engine in made:
            engine.worker.close()
            engine.scheduler.connector.shutdown()
        assert not gpu.pinned


def test_whatever_is_restored_is_what_was_computed(engines, tmp_path, request):
    serve_at_random(engines, random.Random(request.node.name), REQUESTS)
    restored = mixed = 0
    for engine in engines:
        engine.run()
        counters = engine.table.counters()
        restored += counters["tier_tokens_host_memory"]
        assert counters["table_errors"] == 0
        assert engine.checked > REQUESTS
        mixed += mixed_imports(engine)
        tier = TableReader(tmp_path / "tables" / f"{host_memory_of(engine.table.name)}.table")
        assert (engine.table.transport, tier.transport) == ("cuda_ipc", "cuda_ipc")
        assert tier.counters()["published_blocks"] > BLOCKS
    assert restored > 10 * SIZE
    assert mixed > 0
