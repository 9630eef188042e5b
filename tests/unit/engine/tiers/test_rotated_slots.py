"""Host memory that codes blocks of callers who accept loss by rot4 or rot3: in a quarter or a fifth of the room, but for each
sequence's first block, whose first tokens these codecs keep."""

import random
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from engine.tiers.host_memory import HostMemory
from engine.tiers.slot_room import SlotRoom
from engine.tiers.slot_writer import SlotWriter
from engine.tiers.slots import cut
from engine.tiers.stores import Store
from tests.unit.engine.keeper import Keeper
from tests.unit.engine.tiers.test_coded_slots import (
    BITS,
    BLOCKS,
    KEYS,
    OWN,
    SHAPE,
    Tier,
    caches,
    content,
    held,
    key,
    restore,
    take,
    with_coded,
)
from tests.unit.transport.table_fixtures import description
from transport.backends.shared_memory import SharedMemoryTransport
from transport.errors import TableError
from transport.frames import slot_codes
from transport.frames.codec import Block
from transport.frames.codecs import named
from transport.table.kept_table import KeptTable
from transport.table.layout import CHECKSUM_BYTES
from transport.table.quality import CODED, IN_CODE, LATER, LOSSY
from transport.table.reader import TableReader

CODECS = [("rot4", 4), ("rot3", 5)]


class Rotated(Tier):
    """A tier whose coded blocks are of another codec than int8."""

    def __init__(self, path: Path, codec) -> None:
        self.tensors = caches(1)
        self.before = [content(self.tensors, block) for block in range(BLOCKS)]
        self.own = SharedMemoryTransport(self.tensors, BLOCKS, 0)
        self.keeper = Keeper(path)
        kept = self.keeper.keep("r", 1 << 20)
        self.slots = cut(kept.region, self.own.memory(), 1, SHAPE, codec)
        self.writer = SlotWriter(self.own, self.slots)
        about = description("r.host-memory", memories=(self.slots.memory,))
        self.table = KeptTable(path, about, 16, self.slots.count, Path(kept.draft))


def tier_of(path, codec, slots):
    keeper = Keeper(path)
    kept = keeper.keep("replica-0", 1 << 20)
    memory = cut(kept.region, OWN, 1, SHAPE, codec).memory
    table = KeptTable(path, description("replica-0.host-memory", memories=(memory,)), 16, slots, Path(kept.draft))
    return keeper, table, HostMemory(table, ranks=1, elsewhere=lambda keys: np.zeros(len(keys), np.bool_))


@pytest.mark.parametrize(("codec", "whole"), CODECS)
def test_a_slot_fits_a_coded_block_and_some_side_by_side_any_other(tmp_path, codec, whole):
    region = Keeper(tmp_path).keep("r", 1 << 20).region
    plain, coded = cut(region, OWN, 1), cut(region, OWN, 1, SHAPE, codec)
    about, sums = coded.memory.coded, coded.memory.checksums
    assert (about.codec, about.whole, about.first) == (codec, whole, False)
    assert (whole - 0.3) * plain.count < coded.count < (whole + 0.1) * plain.count
    assert about.bytes == slot_codes.coded_size(codec, SHAPE) <= about.checksum == about.stride - CHECKSUM_BYTES
    end = sums.offset + CHECKSUM_BYTES - about.offset
    assert SHAPE.nbytes + CHECKSUM_BYTES <= end <= whole * about.stride < 1.1 * SHAPE.nbytes
    assert about.offset + (coded.count - 1) * about.stride + end <= region.size


@pytest.mark.parametrize(("codec", "whole"), CODECS)
def test_a_first_block_is_kept_as_it_is_and_later_ones_are_coded(tmp_path, codec, whole):
    _keeper, table, memory = tier_of(tmp_path, codec, 3 * whole)
    take(memory, [0], LOSSY)
    take(memory, [1, 2], LOSSY | LATER)
    take(memory, [3], LOSSY | LATER | CODED)  # it came out of a codec
    found = held(table)
    assert {place: bits for place, (_, bits) in found.items()} == {
        0: LOSSY,
        1: LOSSY | LATER | CODED | IN_CODE,
        2: LOSSY | LATER | CODED | IN_CODE,
        3: LOSSY | LATER | CODED,
    }
    assert all(found[place][0] % whole == 0 for place in (0, 3))
    memory.clear()
    take(memory, list(range(3 * whole)), LOSSY | LATER)
    assert sorted(slot for slot, _ in held(table).values()) == list(range(3 * whole))


@pytest.mark.parametrize("codec", ["rot4", "rot3"])
def test_coded_blocks_come_back_as_from_a_frame_and_others_beside_them_byte_for_byte(tmp_path, codec):
    tier = Rotated(tmp_path, codec)
    with closing(tier.writer):
        whole = tier.slots.memory.coded.whole
        tier.store(Store(1, 0, 0, key(0), BITS), Store(2, whole, 0, key(1)), Store(6, 1, 0, key(2), BITS))
        tier.table.publish([0, whole, 1], KEYS[:3], np.array([BITS, 0, BITS], np.uint64))
        tensors, result = restore(tier, [0, whole, 1], [7, 1, 4])
        assert (result.failed_blocks, result.reason) == ((), "")
        assert (content(tensors, 1) == tier.before[2]).all()
        for block, source in ((7, 1), (4, 6)):
            own, want = named(codec), np.empty(SHAPE.nbytes, np.uint8)
            own.decode(memoryview(bytes(own.encode(Block(SHAPE, tier.before[source], position=SHAPE.tokens)))), SHAPE, want)
            assert (content(tensors, block) == want).all()


@pytest.mark.parametrize("codec", ["rot4", "rot3"])
def test_a_changed_byte_is_a_miss_wherever_it_lies(tmp_path, codec):
    tier = Rotated(tmp_path, codec)
    with closing(tier.writer):
        tier.store(Store(1, 0, 0, key(0), BITS))
        tier.table.publish([0], KEYS[:1], BITS)
        size = tier.slots.memory.coded.bytes
        for byte in (0, size // 2, size - 1):
            tier.damage(0, byte)
            assert restore(tier, [0], [3])[1].failed_blocks == (3,)
            tier.damage(0, byte)
        assert restore(tier, [0], [3])[1].failed_blocks == ()


def test_a_codec_that_this_release_does_not_know_is_no_table(tmp_path):
    tier = Rotated(tmp_path, "rot4")
    with closing(tier.writer):
        about = description("x.host-memory", memories=(with_coded(tier.slots.memory, codec="rot2"),))
        kept = tier.keeper.keep("x", 1 << 20)
        table = KeptTable(tmp_path, about, 16, tier.slots.count, Path(kept.draft))
        with pytest.raises(TableError):
            TableReader(table.path)


@pytest.mark.parametrize("whole", [1, 2, 4, 5])
@pytest.mark.parametrize("seed", range(3))
def test_no_slot_is_ever_given_twice_and_what_is_given_back_is_all_there_in_the_end(whole, seed):
    rng, count = random.Random(seed), 6 * whole + (whole > 1)
    room, taken = SlotRoom(count, {whole: whole, 0: 1}, whole=whole), {whole: whole, 0: 1}
    for _ in range(3000):
        size = rng.choice((1, 1, whole))
        slot = room.take(size) if rng.random() < 0.6 else None
        if slot is not None:
            assert size == 1 or slot % whole == 0
            taken[slot] = size
            used = [each + more for each, many in taken.items() for more in range(many)]
            assert len(set(used)) == len(used)
            assert max(used) < count
        elif taken:
            gone = rng.choice(list(taken))
            beside = {each for each in taken if each // whole == gone // whole and each != gone}
            assert set(room.beside(gone)) == beside
            assert room.size(gone) == taken.pop(gone)
            room.give(gone)
        groups = {each // whole for each in taken}
        free = count - sum(taken.values())
        assert room.singles == free - whole * (6 - len({group for group in groups if group < 6}))
    for slot in taken:
        room.give(slot)
    assert {room.take(whole) for _ in range(6)} == set(range(0, 6 * whole, whole))
    assert room.take(1) == (6 * whole if whole > 1 else None)


@pytest.mark.parametrize(("codec", "whole"), CODECS)
def test_under_a_flood_of_all_kinds_the_table_and_the_room_agree(tmp_path, codec, whole):
    _keeper, table, memory = tier_of(tmp_path, codec, 6 * whole + 1)
    rng = random.Random(3)
    for _ in range(600):
        take(memory, [rng.randrange(64)], rng.choice((0, LOSSY, LOSSY | LATER, LOSSY | LATER, LOSSY | LATER)))
        used = [slot + more for slot, bits in held(table).values() for more in range(1 if bits & IN_CODE else whole)]
        assert len(set(used)) == len(used)
        assert max(used) <= 6 * whole
