"""One writer and three readers, each a process, over one table and one buffer: no wrong read is ever accepted.

The copy is what an importer does: look up, copy, check. Without the check wrong reads are seen, so the test can fail.
"""

import multiprocessing
import time
from contextlib import closing

import numpy as np
import pytest

from tests.unit.transport.table_fixtures import writer
from transport.keys import chain_keys, root_key
from transport.table.reader import SUFFIX, TableReader

BLOCKS, PROMPTS, READERS = 4, 12, 3
WORDS = 1 << 15  # of 8 bytes in a block: large enough to be overwritten while it is copied
SECONDS = 1.5
JOIN_SECONDS = 60.0


def key(prompt: int):
    """The key of the one block of a prompt."""
    return chain_keys(root_key(b"f" * 16), [prompt] * 4, 4)


def write(path, buffer, ready, stop):
    """Give blocks to random prompts, over and over, as a scheduler and its worker do."""
    memory = np.memmap(buffer, np.uint64, "r+", shape=(BLOCKS, WORDS))
    random = np.random.default_rng(0)
    with closing(writer(path, blocks=BLOCKS)) as table:
        ready.set()
        while not stop.is_set():
            block, prompt = int(random.integers(BLOCKS)), int(random.integers(PROMPTS))
            table.invalidate([block])
            memory[block] = prompt + 1
            table.publish([block], key(prompt))


def read(path, buffer, checked, seed, begin, stop, outcomes):
    """Import blocks of random prompts; report how many copies were accepted, how many of these were wrong, how many refused."""
    memory = np.memmap(buffer, np.uint64, "r", shape=(BLOCKS, WORDS))
    random = np.random.default_rng(seed)
    accepted = wrong = refused = 0
    with closing(TableReader(path / ("replica-0" + SUFFIX))) as table:
        begin.wait(JOIN_SECONDS)
        while not stop.is_set():
            prompt = int(random.integers(PROMPTS))
            run = table.longest_run(key(prompt))
            if len(run):
                copy = memory[int(run.block_ids[0])].copy()
                if checked and not table.unchanged(run.block_ids, run.states).all():
                    refused += 1
                    continue
                accepted += 1
                wrong += bool((copy != prompt + 1).any())
    outcomes.put((accepted, wrong, refused))


@pytest.mark.parametrize("checked", [True, False])
def test_processes_accept_no_wrong_block_and_without_the_check_they_do(tmp_path, checked):
    context = multiprocessing.get_context("spawn")
    ready, begin, stop, outcomes = context.Event(), context.Barrier(READERS + 1), context.Event(), context.Queue()
    buffer = tmp_path / "memory"
    buffer.write_bytes(bytes(8 * BLOCKS * WORDS))
    owner = context.Process(target=write, args=(tmp_path, buffer, ready, stop))
    owner.start()
    assert ready.wait(JOIN_SECONDS)
    readers = [context.Process(target=read, args=(tmp_path, buffer, checked, i, begin, stop, outcomes)) for i in range(READERS)]
    for reader in readers:
        reader.start()
    try:
        begin.wait(JOIN_SECONDS)
        time.sleep(SECONDS)  # they work meanwhile
    finally:
        stop.set()
    counted = [outcomes.get(timeout=JOIN_SECONDS) for _ in readers]
    for process in (owner, *readers):
        process.join(JOIN_SECONDS)
        assert process.exitcode == 0
    accepted, wrong, refused = (sum(part) for part in zip(*counted, strict=True))
    assert accepted > 100
    if checked:
        assert (wrong, refused > 0) == (0, True)
    else:
        assert wrong > 0
