"""Down and up while everything gives way all the time: no frame and no block is ever anything but what its key says."""

import random
import threading
import time
from contextlib import closing

import numpy as np

from engine.frame_tiers.disk.disk_store import DiskStore
from tests.unit.engine.frame_tiers.node import PLAIN, SIZE, HostMemory, Node, content
from transport.backends.shared_memory import map_region
from transport.frames.shape import Bytes
from transport.table.reader import TableReader

SECONDS, SECONDS_MAX = 2.0, 60.0
READ_MIN, STORED_MIN = 100, 20
SLOTS = 6
STRIDE = 192
BYTES = sum(PLAIN[0][1])


def read_as_an_engine(reader: TableReader, mapped, keys) -> tuple[int, int]:
    """Copy what a table offers and check it as imports do; return how many blocks passed and how many did not."""
    held, slots, states = reader.look_up(keys)
    own = reader.memories[0].layers[0]
    good = bad = 0
    for place in np.flatnonzero(held):
        begin = own.offset + int(slots[place]) * own.stride
        copied: Bytes = np.frombuffer(mapped[begin : begin + BYTES], np.uint8)
        time.sleep(0)
        if reader.unchanged(slots[place : place + 1], states[place : place + 1])[0]:
            good += 1
            assert (copied == content(keys[place].tobytes(), 0, BYTES)).all(), "a block that is not what its key says"
        else:
            bad += 1
    return good, bad


def test_nothing_is_ever_taken_for_anything_else(tmp_path):
    disk = DiskStore(tmp_path / "disk", 2800, segment_bytes=700)  # gives way all the time too
    memory, node = HostMemory(tmp_path, size=SLOTS * STRIDE), Node(tmp_path, disk, staging_bytes=5 * STRIDE)
    began, faults, passed = time.monotonic(), [], [0, 0]

    def over():
        """After SECONDS, or as many more as a busy machine takes until enough was done."""
        spent = time.monotonic() - began
        return spent > SECONDS_MAX or (spent > SECONDS and passed[0] > READ_MIN and disk.stats().stored_frames > STORED_MIN)

    def until_the_end(step):
        def run():
            numbers = random.Random(id(step))
            try:
                while not over():
                    step(numbers)
            except Exception as error:  # noqa: BLE001 - it is told below
                faults.append(error)

        return threading.Thread(target=run)

    def overwrite(numbers):
        memory.put([numbers.randrange(16)], slot=numbers.randrange(SLOTS))

    def promote(numbers):
        begin = numbers.randrange(15)
        node.up(memory, begin=begin * SIZE, seconds=1.0)

    def read(numbers):
        path = tmp_path / "disk.table"
        if path.exists():
            with closing(TableReader(path)) as reader, closing(map_region(reader.memories[0].regions[0])) as mapped:
                for _ in range(20):
                    good, bad = read_as_an_engine(reader, mapped, memory.chain)
                    passed[0] += good
                    passed[1] += bad

    node.demotion.look()
    threads = [until_the_end(step) for step in (overwrite, lambda _: node.demotion.look(), promote, promote, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert passed[0] > READ_MIN
    counts = disk.stats()
    assert counts.stored_frames > STORED_MIN
    assert counts.damaged_frames == 0
    assert counts.evicted_frames > 0
    node.close()
