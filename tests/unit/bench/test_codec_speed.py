"""The benchmark of codecs measures what it says."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bench.codec_speed import SHAPE, blocks, turn
from transport.frames.codecs import named


def test_a_turn_writes_and_reads_every_block():
    made, outs = blocks(2), [np.zeros(SHAPE.nbytes, np.uint8) for _ in range(2)]
    with ThreadPoolExecutor(1) as pool:
        *costs, share = turn(named("raw"), made, outs, pool)
    assert all((out == block.content).all() for out, block in zip(outs, made, strict=True))
    assert len(costs) == 4
    assert 1 < share < 1.001
