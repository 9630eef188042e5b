"""What is read for which block, and where it goes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.node.messages import NodeError, Placed
from transport.node.nixl.spans import CHUNK_BYTES, chunks, group_spans


def test_layers_side_by_side_are_read_as_one_run_and_others_apart() -> None:
    beside = [Placed(1000, 100, 30), Placed(1030, 100, 20), Placed(1050, 100, 50)]
    assert group_spans(beside, 0) == [(1000, 100, 100, 0)]
    apart = [Placed(1000, 30, 30), Placed(9000, 20, 20), Placed(9020, 40, 20)]
    assert group_spans(apart, 0) == [(1000, 30, 30, 0), (9000, 20, 20, 30), (9020, 40, 20, 50)]
    assert group_spans([Placed(0, 8, 8, 1), Placed(8, 8, 8, 0)], 1) == [(0, 8, 8, 0)]


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    layers=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9), st.booleans()), min_size=1, max_size=6),
    seed=st.integers(0, 1 << 30),
)
def test_every_byte_of_every_block_is_read_once_to_its_place(counts, layers, seed) -> None:
    """Against memory in which each byte is known: as NIXL would do it."""
    random = np.random.default_rng(seed)
    memory = random.integers(0, 255, 200_000, np.uint8)
    placed, at = [], 0
    for group in range(len(counts)):
        for size, gap, beside in layers:
            if beside and placed and placed[-1].group == group:
                before = placed.pop()
                if before.address + before.bytes + size <= before.address + before.stride:
                    placed += [before, Placed(before.address + before.bytes, before.stride, size, group)]
                    continue
                placed.append(before)
            placed.append(Placed(at, size + gap, size, group))
            at += 32 * (size + gap)
    sizes_of = [sum(each.bytes for each in placed if each.group == group) for group in range(len(counts))]
    ids = random.integers(0, 32, sum(counts))
    sizes = [sizes_of[group] for group, count in enumerate(counts) for _ in range(count)]
    stride = max(sizes_of) + 3
    target = np.zeros(50 + stride * len(ids), np.uint8)
    for spans in chunks(placed, ids, counts, sizes, (50, stride, len(ids))):
        for offset, address, length in spans.tolist():
            target[offset : offset + length] = memory[address : address + length]
    assert not target[:50].any()
    groups = [group for group, count in enumerate(counts) for _ in range(count)]
    for row, (block, group) in enumerate(zip(ids.tolist(), groups, strict=True)):
        expected = np.concatenate([memory[e.address + block * e.stride :][: e.bytes] for e in placed if e.group == group])
        begin = 50 + row * stride
        assert (target[begin : begin + len(expected)] == expected).all()
        assert not target[begin + len(expected) : begin + stride].any()


def test_no_read_is_larger_than_a_chunk_unless_a_block_is() -> None:
    size = CHUNK_BYTES // 3
    found = chunks([Placed(0, size, size)], np.arange(7), (7,), [size] * 7, (0, size, 7))
    assert [len(spans) for spans in found] == [3, 3, 1]
    large = CHUNK_BYTES * 2
    found = chunks([Placed(0, large, large)], np.arange(2), (2,), [large] * 2, (0, large, 2))
    assert [len(spans) for spans in found] == [1, 1]


@pytest.mark.parametrize(
    ("layers", "sizes", "target"),
    [
        ([Placed(0, 8, 8)], [9], (0, 64, 1)),  # another size than was said
        ([], [8], (0, 64, 1)),
        ([Placed(0, 8, 8)], [8], (0, 4, 1)),  # more than a slot
        ([Placed(0, 8, 8)], [8], (0, 8, 0)),  # more than there are slots
        ([Placed(0, 4, 8)], [8], (0, 8, 1)),  # blocks over each other
        ([Placed(-8, 8, 8)], [8], (0, 8, 1)),
        ([Placed((1 << 64) - 8, 8, 8)], [8], (0, 8, 1)),  # beyond any memory
        ([Placed(0, (1 << 64) - 8, 8)], [8], (0, 8, 1)),
    ],
)
def test_what_does_not_fit_is_not_read(layers, sizes, target) -> None:
    with pytest.raises(NodeError):
        chunks(layers, np.arange(1), (1,), sizes, target)


def test_an_address_that_no_number_holds_is_not_read() -> None:
    with pytest.raises(NodeError):
        chunks([Placed(0, 1 << 40, 8)], np.array([(1 << 32) - 1]), (1,), [8], (0, 8, 1))
