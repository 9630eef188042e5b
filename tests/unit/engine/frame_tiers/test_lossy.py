"""Blocks of callers who accept loss: coded once on their way down, told apart on their way up, and never coded again."""

from contextlib import closing

import numpy as np
import pytest

from engine.frame_tiers.disk.disk_store import DiskStore
from engine.frame_tiers.messages import Promote
from tests.unit.engine.frame_tiers import node as node_module
from tests.unit.engine.frame_tiers.node import SIZE, HostMemory, Node
from transport.backends.shared_memory import map_region
from transport.fingerprint import fingerprint_digest
from transport.frames import layouts, slot_codes
from transport.frames.codec import Quality
from transport.frames.frame import read_header
from transport.frames.lossy import SINK_TOKENS
from transport.frames.shape import Number
from transport.groups import Group
from transport.table.quality import CODED, IN_CODE, LATER, LOSSY, QUALITY
from transport.table.reader import TableReader

ATTENTION = {
    "weights": "w1", "kv dtype": "auto", "attention backend": "CPU_ATTN", "cpu layout": "vec",
    "strides": "torch.bfloat16 (2, 4, 32) (256, 128, 32, 1)",
}  # fmt: skip
LAYER_BYTES = 2 * 2 * SIZE * 32
GROUPS = ((Group("full", SIZE), (LAYER_BYTES, LAYER_BYTES)),)
SHAPE = layouts.cpu_attention(2, 2, SIZE, 16, Number.BFLOAT16)
OTHER_SHAPE = layouts.attention(2, 2, SIZE, 16, Number.BFLOAT16)


@pytest.fixture(autouse=True)
def content(monkeypatch):
    """Blocks of numbers that a codec takes."""

    def numbers(key: bytes, rank: int, size: int):
        drawn = np.random.default_rng(np.frombuffer(key, np.uint64) + rank).normal(size=size // 2).astype(np.float32)
        return (drawn.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)

    monkeypatch.setattr(node_module, "content", numbers)
    return numbers


def as_floats(data) -> np.ndarray:
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)


def ask(node, memory, *, lossy):
    return node.promote(Promote(1, fingerprint_digest(memory.fields), memory.chain.tobytes(), 0, 10.0, lossy))


def staged(node, memory) -> dict[int, tuple[int, bytes]]:
    """By place in the chain: the bits of the block's quality, and its content."""
    with closing(TableReader(node.path / "disk.table")) as reader:
        held, slots, states = reader.look_up(memory.chain)
        layer = reader.memories[0].layers[0]
        with closing(map_region(reader.memories[0].regions[0])) as mapped:
            begins = {place: layer.offset + int(slots[place]) * layer.stride for place in np.flatnonzero(held).tolist()}
            size = sum(each.bytes for each in reader.memories[0].layers)
            return {place: (int(states[place]) & QUALITY, mapped[at : at + size]) for place, at in begins.items()}


def frames(disk, node, memory) -> list[Quality]:
    model = node.models.find(fingerprint_digest(memory.fields))
    found: list[Quality] = []
    disk.fetch(
        [each for key in memory.chain for each in model.ids(key)],
        lambda _, frame: found.append(read_header(frame).quality) is None,
        1e12,
    )
    return found


def test_a_block_of_a_caller_who_accepts_loss_is_kept_in_half_the_space_and_comes_up_marked(tmp_path, content):
    disk = DiskStore(tmp_path / "disk", 1 << 20)
    memory, node = HostMemory(tmp_path, groups=GROUPS, fields=ATTENTION), Node(tmp_path, disk, codec="raw", lossy="int8")
    memory.put(range(4), quality=LOSSY)
    node.down()
    assert frames(disk, node, memory) == [Quality.LOSSY] * 4
    coded = disk.stats().stored_bytes
    assert ask(node, memory, lossy=True).tokens == 4 * SIZE
    for place, (quality, data) in staged(node, memory).items():
        assert quality == LOSSY | CODED
        want = as_floats(content(memory.chain[place].tobytes(), 0, 2 * LAYER_BYTES).tobytes())
        assert 0 < np.abs(as_floats(data) - want).max() < 0.05
    memory.put(range(4, 8), slot=4)
    node.down()
    assert frames(disk, node, memory)[4:] == [Quality.EXACT] * 4
    assert 0.45 < coded / (disk.stats().stored_bytes - coded) < 0.75  # headers and all, of blocks this small
    node.close()


@pytest.mark.parametrize(("codec", "lossy"), [("int8", "int8"), ("int8", "rot4"), ("rot4", "rot4"), ("rot3", "int8")])
def test_a_block_that_lies_coded_goes_down_as_it_lies_and_comes_up_marked(tmp_path, content, codec, lossy):
    disk = DiskStore(tmp_path / "disk", 1 << 20)
    memory = HostMemory(tmp_path, groups=GROUPS, fields=ATTENTION, shape=SHAPE, ranks=2, codec=codec)
    node = Node(tmp_path, disk, codec="raw", lossy=lossy)
    memory.put(range(2), quality=LOSSY | LATER | CODED | IN_CODE)
    memory.put([2], slot=2 * memory.memories[0].coded.whole, quality=LOSSY | CODED)
    node.down()
    assert frames(disk, node, memory) == [Quality.LOSSY] * 6
    assert (node.demotion.lost, node.demotion.unknown) == (0, 0)
    assert ask(node, memory, lossy=True).tokens == 3 * SIZE
    found = staged(node, memory)
    for place in range(3):
        given = content(memory.chain[place].tobytes(), 0, SHAPE.nbytes)
        want = np.empty(SHAPE.nbytes, np.uint8)
        slot_codes.decode(codec, np.frombuffer(slot_codes.encode(codec, given, SHAPE), np.uint8), SHAPE, want)
        assert found[place] == (LOSSY | CODED, (want if place < 2 else given).tobytes())
    node.close()


def test_a_block_that_lies_coded_and_is_damaged_or_of_another_shape_does_not_go_down(tmp_path):
    disk, bits = DiskStore(tmp_path / "disk", 1 << 20), LOSSY | CODED | IN_CODE
    memory = HostMemory(tmp_path, groups=GROUPS, fields=ATTENTION, shape=SHAPE)
    other = HostMemory(tmp_path, "replica-1", GROUPS, fields=ATTENTION | {"weights": "w2"}, shape=OTHER_SHAPE)
    node = Node(tmp_path, disk, codec="raw", lossy="int8")
    memory.put([0], quality=bits)
    memory.map[memory.memories[0].coded.offset + 3] ^= 1
    other.put([1], quality=bits)
    node.down()
    assert (node.demotion.unknown, disk.stats().stored_bytes) == (2, 0)
    node.close()


def large_blocks(path, monkeypatch, lossy):
    """A disk, host memory and a node; blocks have 16 tokens, of each in 2 layers 2 heads of 64 numbers: 16 KiB."""
    monkeypatch.setattr(node_module, "SIZE", 16)
    groups = ((Group("full", 16), (8192, 8192)),)
    fields = ATTENTION | {"strides": "torch.bfloat16 (2, 16, 128) (4096, 2048, 128, 1)"}
    disk = DiskStore(path / "disk", 1 << 20)
    memory = HostMemory(path, groups=groups, size=1 << 18, fields=fields)
    return disk, memory, Node(path, disk, staging_bytes=1 << 18, lossy=lossy)


def by_tokens(data) -> np.ndarray:
    """Bits of such a block as `cpu_attention` has it, (tokens, the rest)."""
    cells = np.frombuffer(data, np.uint16).reshape(4, 2, 64 * 16)
    keys, values = cells[:, 0].reshape(4, 64, 16).transpose(2, 0, 1), cells[:, 1].reshape(4, 16, 64).transpose(1, 0, 2)
    return np.concatenate([keys, values], axis=1).reshape(16, -1)


@pytest.mark.parametrize(("lossy", "off"), [("rot4", 0.6), ("rot3", 1.0)])
def test_of_a_sequences_first_block_the_first_tokens_come_up_to_the_bit_and_of_later_ones_none(
    tmp_path, monkeypatch, content, lossy, off
):
    disk, memory, node = large_blocks(tmp_path, monkeypatch, lossy)
    memory.put([0], quality=LOSSY)
    memory.put([1, 2], slot=1, quality=LOSSY | LATER)
    memory.put([3], slot=3, quality=LOSSY)  # whether it is the first is not known
    node.down()
    assert frames(disk, node, memory)[:4] == [Quality.LOSSY] * 4
    assert ask(node, memory, lossy=True).tokens == 4 * 16
    found = staged(node, memory)
    assert list(found) == [0, 1, 2, 3]
    for place, (quality, data) in found.items():
        assert quality == LOSSY | CODED
        want, came = by_tokens(content(memory.chain[place].tobytes(), 0, 16384)), by_tokens(data)
        kept = SINK_TOKENS if place in (0, 3) else 0
        assert [bool((want[token] == came[token]).all()) for token in range(16)] == [token < kept for token in range(16)]
        assert np.abs(as_floats(want.tobytes()) - as_floats(came.tobytes())).max() < off
    node.close()


def test_four_and_three_bits_take_less_room_than_eight_and_those_less_than_none_lost(tmp_path, monkeypatch):
    sizes: dict[str, list[int]] = {}
    for lossy in ("", "int8", "rot4", "rot3"):
        path = tmp_path / (lossy or "raw-z")
        path.mkdir()
        disk, memory, node = large_blocks(path, monkeypatch, lossy)
        memory.put([0], quality=LOSSY)
        memory.put([1], slot=1, quality=LOSSY | LATER)
        node.down()
        ids = [each for key in memory.chain[:2] for each in node.models.find(fingerprint_digest(memory.fields)).ids(key)]
        found: list[int] = []
        disk.fetch(ids, lambda _, frame, found=found: found.append(len(frame)) is None, 1e12)
        sizes[path.name] = found
        node.close()
    shares = {name: round(later / 16384, 2) for name, (_, later) in sizes.items()}
    assert shares["raw-z"] > 0.6
    assert (shares["int8"], shares["rot4"], shares["rot3"]) == pytest.approx((0.53, 0.28, 0.22), abs=0.02)
    assert sizes["int8"][0] == sizes["int8"][1]
    for first, later in (sizes["rot4"], sizes["rot3"]):
        assert first - later == pytest.approx(SINK_TOKENS / 16 * (16384 - later), rel=0.05)


@pytest.mark.parametrize("lossy", ["int8", "rot4"])
def test_what_lost_something_comes_up_for_nobody_who_wants_it_exact(tmp_path, lossy):
    disk = DiskStore(tmp_path / "disk", 1 << 20)
    memory, node = HostMemory(tmp_path, groups=GROUPS, fields=ATTENTION), Node(tmp_path, disk, lossy=lossy)
    memory.put(range(4), quality=LOSSY)
    node.down()
    found = ask(node, memory, lossy=False)
    assert (found.source, found.tokens) == ("", 0)
    assert staged(node, memory) == {}
    node.close()


@pytest.mark.parametrize("lossy", ["int8", ""], ids=["where-others-are-coded", "where-none-are"])
def test_what_came_out_of_a_codec_goes_down_as_it_is_and_is_known_for_it_when_it_comes_up(tmp_path, content, lossy):
    disk = DiskStore(tmp_path / "disk", 1 << 20)
    memory, node = HostMemory(tmp_path, groups=GROUPS, fields=ATTENTION), Node(tmp_path, disk, lossy=lossy)
    memory.put(range(4), quality=LOSSY | CODED)
    node.down()
    assert frames(disk, node, memory) == [Quality.LOSSY] * 4
    assert ask(node, memory, lossy=False).tokens == 0
    memory.put(range(4), quality=LOSSY | CODED, slot=4)
    node.down()  # what was refused is forgotten
    assert ask(node, memory, lossy=True).tokens == 4 * SIZE
    found = staged(node, memory)
    assert {quality for quality, _ in found.values()} == {LOSSY | CODED}
    whole = {place: content(memory.chain[place].tobytes(), 0, 2 * LAYER_BYTES).tobytes() for place in range(4)}
    assert {place: data for place, (_, data) in found.items()} == whole
    node.close()


@pytest.mark.parametrize(
    ("fields", "groups"),
    [
        (ATTENTION | {"cpu layout": "unknown"}, GROUPS),
        (ATTENTION | {"kv dtype": "fp8"}, GROUPS),
        (ATTENTION, (*GROUPS, (Group("state", SIZE), (LAYER_BYTES, LAYER_BYTES)))),  # a table does not tell the two apart
    ],
    ids=["unknown-layout", "quantised", "states-of-the-same-size"],
)
def test_blocks_that_no_codec_with_loss_can_take_are_kept_exactly(tmp_path, fields, groups):
    disk = DiskStore(tmp_path / "disk", 1 << 20)
    memory, node = HostMemory(tmp_path, groups=groups, fields=fields), Node(tmp_path, disk, lossy="int8")
    memory.put(range(4), quality=LOSSY)
    node.down()
    assert frames(disk, node, memory) == [Quality.EXACT] * 4
    node.close()


def test_numbers_that_no_codec_takes_are_kept_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(node_module, "content", lambda key, rank, size: np.full(size, 0xFF, np.uint8))  # not numbers
    disk = DiskStore(tmp_path / "disk", 1 << 20)
    memory, node = HostMemory(tmp_path, groups=GROUPS, fields=ATTENTION), Node(tmp_path, disk, lossy="int8")
    memory.put(range(2), quality=LOSSY)
    node.down()
    assert frames(disk, node, memory) == [Quality.EXACT] * 2
    node.close()
