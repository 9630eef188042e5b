"""What does not give back what it was given is not used."""

import errno
import os

import pytest

from engine.frame_tiers.disk.disk_store import DiskStore
from engine.frame_tiers.self_test import self_test
from engine.frame_tiers.store import StoreStats
from tests.unit.engine.frame_tiers.frames import entries, fetched, frame


class Broken:
    """A store that does as it is told, but for one thing."""

    def __init__(self, fault):
        self.fault, self.kept = fault, {}

    def put(self, frames):
        self.kept.update({} if self.fault == "loses" else frames)

    def fetch(self, ids, take, deadline):
        for place, each in enumerate(ids):
            if each in self.kept:
                data = bytearray(self.kept[each])
                data[200] ^= self.fault == "changes"
                take(place, memoryview(data))

    def remove(self, ids):
        if self.fault != "keeps":
            self.kept.clear()

    def holds(self, ids, deadline):
        return [each in self.kept for each in ids]

    def stats(self):
        return StoreStats("disk")

    def ready(self):
        return True


@pytest.mark.parametrize(
    ("fault", "said"), [("loses", "did not come back"), ("changes", "did not come back"), ("keeps", "still there"), ("", "")]
)
def test_a_store_that_loses_changes_or_keeps_what_it_should_not_is_found_out(fault, said):
    assert said in self_test(Broken(fault))
    assert bool(self_test(Broken(fault))) == bool(fault)


def test_a_disk_passes_and_nothing_of_the_test_is_left(tmp_path):
    store = DiskStore(tmp_path, 1 << 20)
    assert self_test(store) == ""
    assert store.stats().frames == 0
    store.close()


def test_a_disk_that_is_full_at_the_start_is_used_for_what_it_holds(tmp_path):
    def full(fd, pieces):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = DiskStore(tmp_path, 1 << 20, writev=full)
    assert "is full" in self_test(store)  # and it holds nothing
    store.close()
    store = DiskStore(tmp_path, 1 << 20)
    store.put(entries([1, 2]))
    store.close()
    store = DiskStore(tmp_path, 1 << 20, writev=full)
    assert self_test(store) == ""
    assert store.stats().state.startswith("read-only")
    assert fetched(store, [1, 2]) == {1: frame(1), 2: frame(2)}
    store.close()
