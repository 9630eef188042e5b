"""Host memory that keeps blocks of callers who accept loss coded by int8, in half the room, beside others as they are."""

import mmap
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.tiers.host_memory import HostMemory
from engine.tiers.slot_writer import SlotWriter
from engine.tiers.slots import NoSlots, cut
from engine.tiers.stores import Store, Stores
from tests.real.fleet import until
from tests.unit.engine.keeper import Keeper
from tests.unit.transport.table_fixtures import description
from transport.backends.base import ImportJob
from transport.backends.shared_memory import SharedMemoryTransport, open_region
from transport.errors import MemoryUnreachable
from transport.frames import slot_codes
from transport.frames.layouts import cpu_attention
from transport.frames.shape import Number
from transport.keys import chain_keys, root_key
from transport.table.kept_table import KeptTable
from transport.table.layout import CHECKSUM_BYTES, Layer, Memory
from transport.table.quality import CODED, IN_CODE, LATER, LOSSY, QUALITY
from transport.table.reader import TableReader

BLOCKS, LAYERS, HEADS, TOKENS, WIDTH = 8, 2, 2, 16, 64
SHAPE = cpu_attention(LAYERS, HEADS, TOKENS, WIDTH, Number.BFLOAT16)
LAYER_BYTES = SHAPE.nbytes // LAYERS
KEYS = chain_keys(root_key(b"f" * 16), range(16 * 64), 16)
ACCEPTS = LOSSY | LATER
OWN = Memory(0, "shared_memory", (), tuple(Layer(0, n * 1000, 2000, LAYER_BYTES) for n in range(LAYERS)))


def key(place):
    return KEYS[place].tobytes()


def caches(seed=None):
    generator = torch.Generator().manual_seed(seed or 0)
    shape = (BLOCKS, HEADS, TOKENS, 2 * WIDTH)
    drawn = torch.randn(LAYERS, *shape, generator=generator) if seed else torch.zeros(LAYERS, *shape)
    return {f"layer.{number}": drawn[number].bfloat16().clone() for number in range(LAYERS)}


def content(tensors, block):
    return np.concatenate([tensor[block].contiguous().view(torch.uint8).numpy().reshape(-1) for tensor in tensors.values()])


def restored(before):
    out = np.empty(SHAPE.nbytes, np.uint8)
    slot_codes.decode("int8", np.frombuffer(slot_codes.encode("int8", before, SHAPE), np.uint8), SHAPE, out)
    return out


@pytest.fixture
def keeper(tmp_path):
    return Keeper(tmp_path)


# How slots are cut


def test_a_slot_fits_a_coded_block_and_two_side_by_side_any_other(keeper):
    region = keeper.keep("r", 1 << 20).region
    plain, coded = cut(region, OWN, 2), cut(region, replace_rank(OWN, 1), 2, SHAPE)
    about = coded.memory.coded
    assert about is not None
    assert 1.9 * plain.count < coded.count < 2 * plain.count
    assert about.bytes == slot_codes.coded_size("int8", SHAPE)
    assert bytes.fromhex(about.shape) == SHAPE.packed
    assert about.bytes <= about.checksum == about.stride - CHECKSUM_BYTES
    assert about.offset == min(layer.offset for layer in coded.memory.layers) == region.size // 2  # the second rank's part
    assert {layer.stride for layer in coded.memory.layers} == {about.stride}
    assert coded.memory.checksums is not None
    whole_end = coded.memory.checksums.offset + CHECKSUM_BYTES - about.offset
    assert SHAPE.nbytes + CHECKSUM_BYTES <= whole_end <= 2 * about.stride
    assert about.offset + (coded.count - 1) * about.stride + whole_end <= region.size


def replace_rank(memory, rank):
    return Memory(rank, memory.transport, memory.regions, memory.layers)


def test_what_has_room_for_one_coded_block_alone_has_no_slots(keeper):
    with pytest.raises(NoSlots, match="less than one block"):
        cut(keeper.keep("r", slot_codes.coded_size("int8", SHAPE) + 100).region, OWN, 1, SHAPE)


# Which slots blocks get


def tier_of(keeper, path, slots):
    kept = keeper.keep("replica-0", 1 << 20)
    memory = cut(kept.region, OWN, 1, SHAPE).memory
    table = KeptTable(path, description("replica-0.host-memory", memories=(memory,)), 16, slots, Path(kept.draft))
    return table, HostMemory(table, ranks=1, elsewhere=lambda keys: np.zeros(len(keys), np.bool_))


def take(memory, places, quality):
    memory.take([10 + each for each in places], KEYS[places], [0] * len(places), [quality] * len(places))
    begun = memory.take_stores().begun
    memory.copied({each.slot: 1 for each in begun})
    return begun


def held(table):
    with closing(TableReader(table.path)) as reader:
        found, slots, states = reader.look_up(KEYS)
        return {place: (int(slots[place]), int(states[place]) & QUALITY) for place in np.flatnonzero(found).tolist()}


def test_only_blocks_of_callers_who_accept_loss_that_lost_nothing_yet_are_coded_and_they_take_half_the_room(keeper, tmp_path):
    table, memory = tier_of(keeper, tmp_path, 5)
    take(memory, [0], 0)
    take(memory, [1], ACCEPTS)
    take(memory, [2], LOSSY | CODED)  # it came out of a codec: as it is
    assert held(table) == {0: (0, 0), 1: (4, ACCEPTS | CODED | IN_CODE), 2: (2, LOSSY | CODED)}
    memory.clear()
    take(memory, [0, 1, 2, 3, 4], LOSSY)
    assert sorted(slot for slot, _ in held(table).values()) == [0, 1, 2, 3, 4]


def test_without_coded_slots_the_same_blocks_are_kept_as_they_are(keeper, tmp_path):
    kept = keeper.keep("replica-0", 1 << 20)
    about = description("replica-0.host-memory", memories=(cut(kept.region, OWN, 1).memory,))
    table = KeptTable(tmp_path, about, 16, 4, Path(kept.draft))
    take(HostMemory(table, ranks=1, elsewhere=lambda keys: np.zeros(len(keys), np.bool_)), [0], LOSSY)
    assert held(table) == {0: (0, LOSSY)}


def test_for_a_block_that_is_not_coded_a_pair_gives_way_and_not_one_that_is_read(keeper, tmp_path):
    table, memory = tier_of(keeper, tmp_path, 4)
    take(memory, [0, 1, 2, 3], LOSSY)
    places = held(table)
    memory.restored([places[1][0]])
    take(memory, [8], 0)  # the oldest is 0, beside which 1 is being read
    assert set(held(table)) == {0, 1, 8}
    memory.read([places[1][0]])
    take(memory, [4], LOSSY)
    assert set(held(table)) == {1, 4, 8}
    assert held(table)[8] == (places[2][0] & ~1, 0)


def test_beside_the_last_slot_there_may_be_no_room_for_a_whole_block_whatever_gives_way(keeper, tmp_path):
    table, memory = tier_of(keeper, tmp_path, 3)
    take(memory, [0, 1, 2], LOSSY)
    (last,) = [place for place, (slot, _) in held(table).items() if slot == 2]
    take(memory, [8], 0)
    assert set(held(table)) == {last, 8}


def test_the_next_writer_knows_how_much_room_each_block_takes(keeper, tmp_path):
    table, memory = tier_of(keeper, tmp_path, 6)
    take(memory, [0], 0)
    take(memory, [1, 2, 3], LOSSY)
    before = held(table)
    del memory
    table, memory = tier_of(keeper, tmp_path, 6)
    assert held(table) == before
    (begun,) = take(memory, [4], LOSSY)  # the last free one
    assert begun.slot not in {slot for slot, _ in before.values()} | {1}
    assert len(held(table)) == 5


# What lies in them on the CPU


class Tier:
    """An engine's tensors, its slots and their table."""

    def __init__(self, path: Path) -> None:
        self.tensors = caches(1)
        self.before = [content(self.tensors, block) for block in range(BLOCKS)]
        self.own = SharedMemoryTransport(self.tensors, BLOCKS, 0)
        self.keeper = Keeper(path)
        kept = self.keeper.keep("r", 1 << 20)
        self.slots = cut(kept.region, self.own.memory(), 1, SHAPE)
        self.writer = SlotWriter(self.own, self.slots)
        about = description("r.host-memory", memories=(self.slots.memory,))
        self.table = KeptTable(path, about, 16, self.slots.count, Path(kept.draft))

    def store(self, *stores):
        self.writer.begin(Stores(stores))
        done = []

        def all_done() -> bool:
            done.extend(self.writer.take_copied() + self.writer.take_lost())
            return len(done) == len(stores)

        until(all_done, 20, "stored", 0.001)
        return done

    def damage(self, slot, byte=9):
        fd = open_region(self.slots.memory.regions[0], writable=True)
        with mmap.mmap(fd, self.slots.memory.regions[0].size) as mapped:
            about = self.slots.memory.coded
            mapped[about.offset + slot * about.stride + byte] ^= 1


@pytest.fixture
def tier(tmp_path):
    made = Tier(tmp_path)
    yield made
    made.writer.close()


def restore(tier, slots, targets, taker=None):
    tensors = caches()
    taker = taker or SharedMemoryTransport(tensors, BLOCKS, 0)
    with closing(TableReader(tier.table.path)) as reader:
        states = np.array([reader._states[slot] for slot in slots], np.uint64)
        ids = np.array(slots, np.int32)
        taker.start(ImportJob("q", reader.name, reader.epoch, ids, states, np.array(targets, np.int32)), reader, gently=True)
        results = []
        until(lambda: bool(results.extend(taker.poll()) or results), 20, "the import ends", 0.001)
    return tensors, results[0]


BITS = LOSSY | CODED | IN_CODE


def test_coded_blocks_come_back_as_from_a_frame_and_others_beside_them_byte_for_byte(tier):
    tier.store(Store(1, 2, 0, key(0), BITS), Store(2, 4, 0, key(1)), Store(6, 3, 0, key(2), BITS))
    tier.table.publish([2, 4, 3], KEYS[:3], np.array([BITS, 0, BITS], np.uint64))
    tensors, result = restore(tier, [2, 4, 3], [7, 1, 4])
    assert (result.failed_blocks, result.reason, result.bytes) == ((), "", 3 * SHAPE.nbytes)
    assert (content(tensors, 1) == tier.before[2]).all()
    for block, source in ((7, 1), (4, 6)):
        assert (content(tensors, block) == restored(tier.before[source])).all()
        assert (content(tensors, block) != tier.before[source]).any()


def test_a_coded_block_with_a_changed_byte_or_under_another_key_is_not_used(tier):
    tier.store(*(Store(block, block, 0, key(block), BITS) for block in range(3)))
    tier.table.publish([0, 1, 2], KEYS[[0, 1, 7]], BITS)
    tier.damage(1)
    tensors, result = restore(tier, [0, 1, 2], [0, 1, 2])
    assert set(result.failed_blocks) == {1, 2}
    assert result.stale_blocks == 2
    assert (content(tensors, 0) == restored(tier.before[0])).all()
    assert not content(tensors, 1).any()


def test_a_block_that_cannot_be_coded_is_lost(tier):
    tier.tensors["layer.1"][3, 0, 0, 0] = float("nan")
    tier.writer.begin(Stores((Store(3, 0, 0, key(0), BITS), Store(4, 1, 0, key(1), BITS))))
    copied, lost = [], []

    def ended() -> bool:
        copied.extend(tier.writer.take_copied())
        lost.extend(tier.writer.take_lost())
        return len(copied) + len(lost) == 2

    until(ended, 20, "both ended", 0.001)
    assert (copied, lost) == ([1], [0])


def test_coded_blocks_without_a_word_on_how_they_lie_or_of_another_shape_are_not_read(tier):
    tier.store(Store(1, 2, 0, key(0), BITS))
    tier.table.publish([2], KEYS[:1], BITS)
    with closing(TableReader(tier.table.path)) as reader:
        job = ImportJob("q", reader.name, reader.epoch, np.array([2], np.int32), reader._states[[2]], np.array([1], np.int32))
        memory = reader.memories[0]
        other = cpu_attention(LAYERS, HEADS, TOKENS, 2 * WIDTH, Number.BFLOAT16).packed.hex()
        beyond = with_coded(memory, offset=memory.regions[0].size - 64)
        for wrong, why in ((None, "does not say"), (other, "coded blocks of"), ("zz", "cannot be")):
            changed = (
                with_coded(memory, shape=wrong)
                if wrong
                else Memory(0, memory.transport, memory.regions, memory.layers, memory.checksums)
            )
            with pytest.raises(MemoryUnreachable, match=why):
                SharedMemoryTransport(caches(), BLOCKS, 0).start(job, Told(reader, changed), gently=True)
        with pytest.raises(MemoryUnreachable, match="do not fit"):
            SharedMemoryTransport(caches(), BLOCKS, 0).start(job, Told(reader, beyond), gently=True)


def with_coded(memory, **changes):
    fields = {name: getattr(memory.coded, name) for name in memory.coded.__struct_fields__} | changes
    return Memory(memory.rank, memory.transport, memory.regions, memory.layers, memory.checksums, type(memory.coded)(**fields))


class Told:
    """A table's reader that describes other memory."""

    def __init__(self, reader, memory) -> None:
        self.name, self.epoch, self.num_blocks, self.memories = reader.name, reader.epoch, reader.num_blocks, (memory,)
