"""How often blocks were asked for."""

import numpy as np
import pytest

from engine.tiers.ask_counts import ASKS_PER_BLOCK, COUNT_MAX, AskCounts
from transport.keys import chain_keys, root_key

KEYS = chain_keys(root_key(b"f" * 16), range(4 * 4096), 4)


@pytest.mark.parametrize("blocks", [1, 3, 1024])
def test_counts_are_of_each_key_and_those_that_nobody_asked_for_count_as_asked_for_once(blocks):
    counts = AskCounts(blocks)
    counts.add(KEYS[:4])
    counts.add(KEYS[1:3])
    counts.add(KEYS[:0])
    assert counts.of(KEYS[:4]).tolist() == [1, 2, 2, 1]
    assert counts.of(KEYS[1000:1001]).tolist() == [1]
    assert counts.of(KEYS[:0]).tolist() == []


def test_an_estimate_is_rarely_too_high_when_as_many_were_asked_for_as_make_it_halve():
    counts = AskCounts(256)
    for _ in range(3):
        counts.add(KEYS[:64])
    for begin in range(64, ASKS_PER_BLOCK * 256 - 3 * 64, 64):
        counts.add(KEYS[begin : begin + 64])
    assert counts.of(KEYS[:64]).tolist() == [3] * 64
    assert np.mean(counts.of(KEYS[64:3904]) > 1) < 0.1


def test_counts_are_halved_when_many_were_asked_for():
    counts = AskCounts(16)
    for _ in range(ASKS_PER_BLOCK - 1):
        counts.add(KEYS[:16])
    assert counts.of(KEYS[:1]).tolist() == [ASKS_PER_BLOCK - 1]
    counts.add(KEYS[:16])
    assert counts.of(KEYS[:1]).tolist() == [ASKS_PER_BLOCK // 2]


def test_a_count_does_not_overflow():
    counts = AskCounts(1024)
    for _ in range(COUNT_MAX + 9):
        counts.add(KEYS[:1])
    assert counts.of(KEYS[:1]).tolist() == [COUNT_MAX]
