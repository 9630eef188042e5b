"""Windows and states that a simulated GPU stored in host memory reach the disk and come up again, each as what it is."""

import importlib
import os
from contextlib import closing
from pathlib import Path

import pytest
import torch

from engine.frame_tiers.disk.disk_store import DiskStore
from engine.frame_tiers.messages import Promote
from engine.tiers.slots import cut
from engine.tiers.stores import Store, Stores
from tests.real.fleet import until
from tests.unit.engine.frame_tiers.node import FIELDS, SIZE, Node
from tests.unit.engine.keeper import Keeper
from tests.unit.transport.backends.simulated_gpu import WRITER, simulated
from transport.backends.shared_memory import map_region
from transport.fingerprint import fingerprint_digest
from transport.groups import Group, unit
from transport.keys import chain_keys, group_keys, root_key
from transport.table.kept_table import KeptTable
from transport.table.layout import Description
from transport.table.reader import TableReader
from transport.table.tiers import host_memory_of

BLOCKS, PLACES = 12, 4
KINDS = (Group("full", SIZE), Group("state", SIZE))
OF_LAYER = {"a.0": 0, "a.1": 0, "s.0": 1, "s.1": 1}
WORDS = {"a.0": 8, "a.1": 8, "s.0": 4, "s.1": 5}
CHAIN = chain_keys(root_key(fingerprint_digest(FIELDS)), range(PLACES * SIZE), SIZE)


class Gpu:
    """A replica's blocks on a GPU, block 1 onwards those of `CHAIN`, states those behind; all of them in host memory."""

    def __init__(self, path: Path, gpu, cuda_ipc) -> None:
        generator = torch.Generator().manual_seed(3)
        self.tensors = {
            name: torch.randint(-(2**62), 2**62, (BLOCKS, words), generator=generator) for name, words in WORDS.items()
        }
        self.own = cuda_ipc.CudaIpcTransport(self.tensors, BLOCKS, 0, OF_LAYER)
        self.keeper = Keeper(path)
        kept = self.keeper.keep("replica-0", 1 << 14)
        self.slots = cut(kept.region, self.own.memory(), 1)
        self.writer = importlib.import_module(WRITER).CudaSlotWriter(self.own, self.slots)
        about = Description(
            host_memory_of("replica-0"), os.getpid(), "xxh3_128", "cuda_ipc", "ok", FIELDS, (self.slots.memory,), KINDS
        )
        self.table = KeptTable(path, about, unit(KINDS), self.slots.count, Path(kept.draft))
        until(self.writer._slots.done, 20, "the slots are open", 0.001)
        stores = [
            Store(1 + group * PLACES + place, group * PLACES + place, group, group_keys(CHAIN, group)[place].tobytes())
            for group in (0, 1)
            for place in range(PLACES)
        ]
        self.writer.begin(Stores(tuple(stores), at_once=True))
        gpu.all()
        assert sorted(self.writer.take_copied()) == list(range(2 * PLACES))
        for store in stores:
            self.table.publish([store.slot], group_keys(CHAIN, store.group)[store.slot % PLACES : store.slot % PLACES + 1])

    def content(self, group: int, place: int) -> bytes:
        block = 1 + group * PLACES + place
        return b"".join(self.tensors[name][block].numpy().tobytes() for name, each in OF_LAYER.items() if each == group)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    with simulated(monkeypatch, 1) as (gpu, cuda_ipc):
        made = Gpu(tmp_path, gpu, cuda_ipc)
        yield made
        made.writer.close()
        made.own.close()


@pytest.fixture
def node(tmp_path):
    made = Node(tmp_path, DiskStore(tmp_path / "disk", 1 << 20))
    yield made
    made.close()


def test_what_a_gpu_stored_of_every_group_goes_down_and_comes_up_to_the_last_bit(gpu, node, tmp_path):
    assert node.down() == 2 * PLACES
    assert (node.demotion.unknown, node.demotion.lost) == (0, 0)
    assert node.writers[0].store.stats().frames == 2 * PLACES
    found = node.promote(Promote(1, fingerprint_digest(FIELDS), CHAIN.tobytes(), 0, 10.0))
    assert (found.source, found.tokens) == ("disk", PLACES * SIZE)
    with closing(TableReader(tmp_path / "disk.table")) as reader, closing(map_region(reader.memories[0].regions[0])) as mapped:
        for group, wanted in ((0, range(PLACES)), (1, [PLACES - 1])):  # of states only the last one is of use
            held, slots, _ = reader.look_up(group_keys(CHAIN, group)[wanted.start if group == 0 else PLACES - 1 :])
            assert held.all()
            layer = next(each for each in reader.memories[0].layers if each.group == group)
            for place, slot in zip(wanted, slots.tolist(), strict=True):
                begin = layer.offset + slot * layer.stride
                content = gpu.content(group, place)
                assert mapped[begin : begin + len(content)] == content


@pytest.mark.parametrize("told", [0, 3, 255])
def test_a_block_of_which_it_is_not_said_what_it_is_is_left_and_counted(gpu, node, told):
    about = gpu.slots.memory.group_bytes
    with closing(map_region(gpu.slots.memory.regions[0], writable=True)) as mapped:
        mapped[about.offset + 5 * about.stride] = told
    node.down()
    assert node.demotion.unknown == 1
    assert node.writers[0].store.stats().frames == 2 * PLACES - 1


def test_a_slot_that_is_filled_anew_says_what_it_holds_then(gpu, node):
    gpu.table.invalidate([0])
    with closing(map_region(gpu.slots.memory.regions[0])) as mapped:
        about = gpu.slots.memory.group_bytes
        assert [mapped[about.offset + slot * about.stride] for slot in (0, PLACES)] == [1, 2]
        gpu.writer.begin(Stores((Store(9, 0, 1, b"k" * 16),), at_once=True))
        assert mapped[about.offset] == 2
