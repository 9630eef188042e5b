"""Blocks go down from host memory into stores, and come up into memory that engines import from, or not at all."""

import os
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest

from engine.frame_tiers import demotion as demotion_module
from engine.frame_tiers.disk.disk_store import DiskStore
from engine.frame_tiers.messages import Promote
from engine.frame_tiers.store import StoreStats, frame_id
from engine.frame_tiers.writing import Writer
from tests.real.fleet import until
from tests.unit.engine.frame_tiers.node import HYBRID, PLAIN, SIZE, HostMemory, Node
from transport.backends.shared_memory import map_region
from transport.errors import MemoryUnreachable
from transport.fingerprint import fingerprint_digest
from transport.frames import codecs, layouts
from transport.frames.codec import Block
from transport.frames.frame import write
from transport.frames.shape import Number
from transport.table.reader import TableReader


class Memory:
    """A store in a dictionary. `name` decides whether it is asked what it holds before it is asked for it."""

    def __init__(self, name="vault"):
        self.name, self.kept, self.takes, self.late, self.asked = name, {}, True, 0.0, []

    def stats(self):
        return StoreStats(self.name)

    def ready(self):
        return self.takes

    def knows(self, each):
        return each in self.kept

    def holds(self, ids, deadline):
        return [each in self.kept for each in ids]

    def put(self, frames):
        self.kept.update(frames)

    def fetch(self, ids, take, deadline):
        self.asked.append(len(ids))
        for place, each in enumerate(ids):
            if each in self.kept and time.monotonic() < deadline:
                time.sleep(self.late)
                if not take(place, memoryview(self.kept[each])):
                    del self.kept[each]

    def remove(self, ids):
        for each in ids:
            self.kept.pop(each, None)

    def flush(self):
        self.kept.clear()
        return ""

    def tend(self):
        pass

    def close(self):
        pass


@dataclass
class Here:
    memory: HostMemory
    node: Node
    disk: DiskStore


@pytest.fixture
def here(tmp_path):
    disk = DiskStore(tmp_path / "disk", 1 << 20)
    found = Here(HostMemory(tmp_path), Node(tmp_path, disk), disk)
    yield found
    found.node.close()


def nodes(path, *stores, groups=PLAIN, **about):
    return HostMemory(path, groups=groups, **{k: v for k, v in about.items() if k == "ranks"}), Node(
        path, *stores, **{k: v for k, v in about.items() if k != "ranks"}
    )


def test_what_was_brought_up_goes_with_who_brought_it_up(here):
    here.memory.put(range(8))
    here.node.down()
    assert here.node.up(here.memory).source == "disk"
    with closing(TableReader(here.node.path / "disk.table")) as reader:
        (region,) = reader.memories[0].regions
        map_region(region).close()
        here.node.promotion.close()
        assert not reader.alive()
        with pytest.raises(MemoryUnreachable):
            map_region(region)


def test_what_is_in_host_memory_goes_down_once_and_comes_up_to_the_last_bit(here):
    here.memory.put(range(10))
    assert here.node.down() == 10
    assert here.node.down() == 0
    assert here.disk.stats().stored_frames == 10
    found = here.node.up(here.memory)
    assert (found.source, found.tokens, found.frames) == ("disk", 10 * SIZE, 10)
    assert here.node.staged(here.memory) == list(range(10))
    again = here.node.up(here.memory)
    assert (again.tokens, again.frames) == (10 * SIZE, 0)  # it is up already


def test_it_survives_its_process_and_the_replicas(tmp_path):
    memory, node = nodes(tmp_path, DiskStore(tmp_path / "disk", 1 << 20))
    memory.put(range(10))
    node.down()
    node.close()
    memory.table.clear()
    after = Node(tmp_path, DiskStore(tmp_path / "disk", 1 << 20))
    after.down()
    assert after.up(memory).tokens == 10 * SIZE
    assert after.staged(memory) == list(range(10))
    after.close()


def test_the_end_of_a_prefix_comes_up_for_who_has_its_beginning(here):
    here.memory.put(range(6, 12))
    here.node.down()
    assert here.node.up(here.memory).source == ""
    found = here.node.up(here.memory, begin=6 * SIZE)
    assert (found.tokens, here.node.staged(here.memory)) == (12 * SIZE, list(range(6, 12)))


@pytest.mark.parametrize("name", ["disk", "vault"])
def test_a_hole_ends_what_comes_up(tmp_path, name):
    memory, node = nodes(tmp_path, Memory(name))
    memory.put([0, 1, 2, 4, 5])
    node.down()
    assert node.up(memory).tokens == 3 * SIZE
    node.close()


def test_a_vault_is_asked_once_for_a_whole_prefix_and_a_prompt_that_nobody_knows_pushes_nothing_out(tmp_path):
    vault = Memory("vault")
    memory, node = nodes(tmp_path, vault, staging_bytes=17 * 192)
    memory.put(range(10))
    node.down()
    assert node.up(memory).source == "vault"
    assert vault.asked == [16]
    unknown = np.arange(32, dtype=np.uint64).reshape(16, 2)
    assert node.promote(Promote(1, fingerprint_digest(memory.fields), unknown.tobytes(), 0, 5.0)).source == ""
    assert node.staged(memory, "vault") == list(range(10))
    node.close()


def test_disk_and_vault_complete_each_other(tmp_path):
    disk, vault = Memory("disk"), Memory("vault")
    memory, node = nodes(tmp_path, disk, vault)
    memory.put(range(10))
    node.down()
    assert node.up(memory, 10 * SIZE).source == "disk"
    assert vault.asked == []  # the disk has it all
    node.promotion.clear()
    for place in (3, 4, 5, 8, 9):
        disk.remove([node.models.find(fingerprint_digest(memory.fields)).ids(memory.keys()[place])[0]])
    found = node.up(memory, 10 * SIZE)
    assert (found.source, found.tokens, found.frames) == ("vault", 10 * SIZE, 10)
    assert node.staged(memory, "vault") == list(range(10))
    node.promotion.clear()
    disk.flush()
    gone, fetch = set(), disk.fetch
    disk.holds = lambda ids, deadline: [each not in gone for each in ids]  # it says so until it is read
    disk.fetch = lambda ids, take, deadline: (gone.update(ids), fetch(ids, take, deadline))
    assert node.up(memory, 10 * SIZE).source == "vault"
    del disk.holds, disk.fetch
    node.promotion.clear()
    disk.put(
        [
            (each, vault.kept[each])
            for place in range(3)
            for each in node.models.find(fingerprint_digest(memory.fields)).ids(memory.chain[place])
        ]
    )
    vault.flush()
    assert (node.up(memory).source, node.up(memory).tokens) == ("disk", 3 * SIZE)
    node.close()


def test_every_rank_has_frames_of_its_own_and_all_are_needed(tmp_path):
    vault = Memory("vault")
    memory, node = nodes(tmp_path, vault, ranks=2)
    memory.put(range(4))
    node.down()
    assert len(vault.kept) == 8
    assert node.up(memory).tokens == 4 * SIZE
    assert node.staged(memory, "vault") == [0, 1, 2, 3]
    node.promotion.clear()
    model = node.models.find(fingerprint_digest(memory.fields))
    vault.remove([model.ids(memory.keys()[2])[1]])
    assert node.up(memory).tokens == 2 * SIZE
    node.close()


@pytest.mark.parametrize("name", ["disk", "vault"])
def test_of_a_hybrid_model_only_a_length_at_which_every_group_has_its_blocks_comes_up(tmp_path, name):
    memory, node = nodes(tmp_path, Memory(name), groups=HYBRID)
    memory.put(range(12), group=0)
    memory.put([3, 8], group=1, slot=20)
    node.down()
    found = node.up(memory)
    assert found.tokens == 9 * SIZE
    assert node.staged(memory, name, group=0) == list(range(9))
    assert node.staged(memory, name, group=1) == [8]
    node.close()


def test_another_models_frames_a_changed_one_and_one_with_loss_never_come_up(tmp_path):
    vault = Memory("vault")
    memory, node = nodes(tmp_path, vault, codec="raw")
    memory.put(range(6))
    node.down()
    model = node.models.find(fingerprint_digest(memory.fields))
    ids = [model.ids(key)[0] for key in memory.chain]
    vault.kept[ids[1]] = vault.kept[ids[0]]  # somebody else's
    assert node.up(memory).tokens == SIZE
    assert ids[1] not in vault.kept
    assert node.staged(memory, "vault") == [0, 2, 3, 4, 5]
    node.promotion.clear()
    frame = bytearray(vault.kept[ids[2]])
    for place in range(len(frame)):
        frame[place] ^= 4
        vault.kept[ids[2]] = bytes(frame)
        assert node.up(memory, 3 * SIZE, begin=2 * SIZE).tokens == 0, place
        assert ids[2] not in vault.kept
        frame[place] ^= 4
    shape = layouts.attention(1, 1, 4, 8, Number.BFLOAT16)
    assert shape.nbytes == model.shapes[0].nbytes
    lossy = Block(shape, np.zeros(shape.nbytes, np.uint8))
    vault.kept[ids[3]] = write(codecs.named("int8"), lossy, fingerprint=model.ranks[0], key=ids[3][16:])
    assert frame_id(vault.kept[ids[3]]) == ids[3]
    assert node.up(memory, 4 * SIZE, begin=3 * SIZE).source == ""
    foreign = write(
        codecs.named("raw"), Block(model.shapes[0], np.zeros(128, np.uint8)), fingerprint=b"x" * 16, key=ids[4][16:]
    )
    vault.kept[ids[4]] = foreign
    assert node.up(memory, 5 * SIZE, begin=4 * SIZE).source == ""
    assert node.staged(memory, "vault") == []
    node.close()


def test_a_prompt_larger_than_the_memory_comes_up_in_part_and_pushes_out_what_is_older(tmp_path):
    vault = Memory("vault")
    memory, node = nodes(tmp_path, vault, staging_bytes=5 * 192)
    memory.put(range(12))
    node.down()
    assert node.up(memory).tokens == 5 * SIZE
    assert node.staged(memory, "vault") == [0, 1, 2, 3, 4]
    assert node.up(memory, begin=8 * SIZE).tokens == 12 * SIZE
    assert node.staged(memory, "vault")[-4:] == [8, 9, 10, 11]
    assert node.promotion.staged == 9
    node.close()


def test_what_is_not_there_in_time_is_computed_and_what_is_counts(tmp_path):
    vault = Memory("vault")
    memory, node = nodes(tmp_path, vault)
    memory.put(range(10))
    node.down()
    vault.late = 0.05
    began = time.monotonic()
    found = node.up(memory, seconds=0.12)
    assert time.monotonic() - began < 1.0
    assert 0 < found.tokens < 10 * SIZE
    assert node.promotion.late == 1
    node.promotion.clear()
    assert node.up(memory, seconds=0.0).why == "not in time"
    node.close()


def test_what_gave_way_in_host_memory_before_it_was_copied_is_lost_and_counted(here):
    here.memory.put(range(3))
    here.node.down()
    here.memory.put(range(3, 6))
    here.memory.put(range(6, 9))  # over the others, before anybody looked
    here.node.down()
    assert here.node.demotion.lost == 3
    assert here.disk.stats().frames == 6


def test_a_block_that_is_being_overwritten_is_not_written(here, monkeypatch):
    here.memory.put([0])
    here.node.down()
    copied = demotion_module._content

    def overwritten(watched, rank, slot, key):
        found = copied(watched, rank, slot, key)
        here.memory.put([2], slot=slot)
        return found

    monkeypatch.setattr(demotion_module, "_content", overwritten)
    here.memory.put([1], slot=1)
    here.node.down()
    assert here.node.demotion.lost == 1
    monkeypatch.setattr(demotion_module, "_content", copied)
    here.node.down()
    assert here.node.up(here.memory, begin=2 * SIZE).tokens == 3 * SIZE
    assert here.node.up(here.memory, begin=SIZE).source == ""


def test_a_block_that_does_not_match_its_checksum_is_not_written(here):
    here.memory.put([0, 1])
    here.memory.map[here.memory.offset(1) + 5] ^= 1
    here.node.down()
    assert here.disk.stats().frames == 1


def test_a_store_that_takes_nothing_holds_up_nobody_and_drops_are_counted():
    store = Memory()
    blocked = threading.Event()
    store.put = lambda frames: blocked.wait(20)
    writer = Writer(store, queue_bytes_max=1000)
    assert writer.offer(b"a", bytes(900), 0.0)
    deadline = time.monotonic() + 10
    while writer._queue:  # until the thread took it, and hangs
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert writer.offer(b"b", bytes(900), 0.0)
    assert not writer.offer(b"c", bytes(900), 0.05)
    store.takes = False
    began = time.monotonic()
    assert not writer.offer(b"d", bytes(900), 10.0)
    assert time.monotonic() - began < 1.0
    assert writer.dropped == 2
    blocked.set()
    writer.close(5.0)


def test_where_descriptors_are_short_for_a_moment_host_memory_is_stored_after_it(here, monkeypatch):
    here.memory.put(range(5))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    here.node.demotion.look()  # opens the table
    here.node.demotion._watched.clear()
    os.close(least_free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (least_free, limit[1]))
    try:
        assert here.node.demotion.look() == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert here.node.down() == 5


def test_a_slow_vault_does_not_hold_up_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(demotion_module, "WAIT_SECONDS_MAX", 10.0)
    disk, vault, goes_on = Memory("disk"), Memory("vault"), threading.Event()
    vault.put = lambda frames: goes_on.wait(60)
    memory, node = nodes(tmp_path, disk)
    node.writers.append(Writer(vault, queue_bytes_max=1))
    memory.put(range(8))
    began = time.monotonic()
    assert node.demotion.look() == 8
    assert time.monotonic() - began < 10.0
    until(lambda: len(disk.kept) == 8, 20, "all are on the disk", 0.001)
    assert node.writers[1].dropped >= 6  # one is being written, one is queued
    goes_on.set()
    node.close()


def test_a_flush_forgets_what_is_queued_stored_and_up(here):
    here.memory.put(range(5))
    here.node.down()
    here.node.up(here.memory)
    here.memory.table.clear()
    here.node.demotion.forget()
    assert [writer.flush() for writer in here.node.writers] == [""]
    here.node.promotion.clear()
    assert here.node.up(here.memory).source == ""
    assert here.node.staged(here.memory) == []


def test_a_frame_that_waited_for_room_during_a_flush_is_not_written_after_it():
    store, putting, done, since = Memory(), threading.Event(), threading.Event(), []
    put = store.put

    def slow(frames):
        putting.set()
        assert done.wait(60)
        put(frames)

    store.put = slow
    writer = Writer(store, queue_bytes_max=1000)
    writer.offer(b"a", bytes(900), 0.0)
    assert putting.wait(60)
    writer.offer(b"b", bytes(900), 0.0)
    with ThreadPoolExecutor(2) as beside:
        waiting = beside.submit(writer.offer, b"c", bytes(900), 60.0, lambda: not since)
        since.append("a flush")
        flushing = beside.submit(writer.flush)
        done.set()
        assert (waiting.result(60), flushing.result(60)) == (False, "")
    writer.close(5.0)
    assert (store.kept, writer.dropped) == ({}, 0)


def test_what_was_read_before_a_flush_does_not_come_up_after_it(tmp_path):
    vault = Memory("vault")
    memory, node = nodes(tmp_path, vault)
    memory.put(range(4))
    node.down()
    fetch = vault.fetch

    def flushed_meanwhile(ids, take, deadline):
        def taken(place, frame):
            node.promotion.clear()
            return take(place, frame)

        fetch(ids, taken, deadline)

    vault.fetch = flushed_meanwhile
    assert node.up(memory).source == ""
    assert node.staged(memory, "vault") == []
    vault.fetch = fetch
    assert node.up(memory).tokens == 4 * SIZE  # and its slots are free again
    node.close()


def test_what_is_queued_is_written_at_the_end():
    store = Memory()
    writer = Writer(store)
    for number in range(100):
        writer.offer(b"%d" % number, bytes(1000), 0.0)
    writer.close(20.0)
    assert len(store.kept) == 100


def test_a_prompt_of_a_model_that_is_not_served_here_is_a_miss_with_a_word(here):
    here.node.down()
    found = here.node.promote(Promote(1, b"another" + bytes(9), here.memory.chain.tobytes(), 0, 1.0))
    assert (found.source, found.why) == ("", "no such model is served here")
    odd = msgspec.structs.replace(Promote(1, fingerprint_digest(here.memory.fields), b"odd", 0, 1.0))
    assert here.node.promote(odd).why == "no chain"


def test_a_block_that_came_up_is_withdrawn_before_its_slot_is_written_again(tmp_path):
    """As the engine's check relies on it: an import that reads a slot of this kind fails and is computed."""
    vault = Memory("vault")
    memory, node = nodes(tmp_path, vault, staging_bytes=2 * 192)
    memory.put(range(4))
    node.down()
    node.up(memory, 2 * SIZE)
    assert node.staged(memory, "vault") == [0, 1]
    node.up(memory, begin=2 * SIZE, tokens=4 * SIZE)
    assert node.staged(memory, "vault") == [2, 3]
    node.close()
