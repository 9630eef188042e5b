"""Frames on a disk: what survives a restart, what gives way, and what a disk that fails or is changed does."""

import errno
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.frame_tiers.disk.disk_store import FULL_SECONDS, READ_ONLY_SECONDS, DiskStore
from engine.frame_tiers.disk.segment import HEAD
from engine.frame_tiers.store import StoreRefused
from tests.unit.engine.frame_tiers.frames import SIZE, entries, fetched, frame, ids, soon, whole

BUDGET = 1 << 20


@pytest.fixture
def opened(tmp_path):
    """Opens stores in one directory, and closes them."""
    stores = []

    def open_store(bytes_max=BUDGET, **about):
        for store in stores:
            store.close()
        stores.append(DiskStore(tmp_path, bytes_max, **about))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def segments(path):
    return sorted(path.glob("*.frames"))


def held(store, numbers):
    return [number for number, there in zip(numbers, store.holds(ids(numbers), soon()), strict=True) if there]


def test_frames_come_back_byte_for_byte_also_after_a_restart(opened):
    store = opened()
    store.put(entries(range(40)))
    for _ in range(2):
        assert fetched(store, [7, 3, 39, 99]) == {number: frame(number) for number in (7, 3, 39)}
        counts = store.stats()
        assert (counts.frames, counts.found_frames, counts.missed_frames, counts.damaged_frames) == (40, 3, 1, 0)
        store = opened()


def test_what_is_there_already_is_not_written_again(opened):
    store = opened()
    store.put(entries([1, 2]))
    store.put(entries([2, 3, 3]))
    assert store.stats().stored_frames == 3
    assert store.stats().bytes == HEAD.size + 3 * SIZE


def test_the_segment_that_was_used_longest_ago_gives_way_within_the_budget(opened, tmp_path):
    store = opened(12 * SIZE, segment_bytes=3 * SIZE + HEAD.size)  # three segments of three frames, as a fourth does not fit
    store.put(entries(range(9)))
    fetched(store, [0])
    store.put(entries([9]))
    assert held(store, range(10)) == [0, 1, 2, 6, 7, 8, 9]
    assert store.stats().evicted_frames == 3
    assert sum(path.stat().st_size for path in segments(tmp_path)) == store.stats().bytes <= 12 * SIZE


def test_a_budget_of_zero_keeps_nothing_and_one_smaller_than_a_prompt_keeps_some(opened, tmp_path):
    store = opened(0)
    store.put(entries(range(3)))
    assert (store.stats().frames, store.stats().dropped_frames, segments(tmp_path)) == (0, 3, [])
    store = opened(4 * (SIZE + HEAD.size))
    store.put(entries(range(100)))
    assert 0 < store.stats().frames <= 4
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= 4 * (SIZE + HEAD.size)
    assert fetched(store, held(store, range(100)), whole)


def test_a_smaller_budget_after_a_restart_is_kept_too(opened, tmp_path):
    opened(segment_bytes=5 * SIZE).put(entries(range(40)))
    store = opened(10 * SIZE, segment_bytes=5 * SIZE)
    assert store.stats().bytes <= 10 * SIZE
    assert held(store, range(40))[-1] == 39


def test_frames_expire_by_the_clock_also_after_a_restart(opened):
    now = [1000.0]
    store = opened(ttl_seconds=80, clock=lambda: now[0])
    store.put(entries([1]))
    now[0] += 15
    store.tend()  # closes the first segment
    store.put(entries([2]))
    now[0] += 66
    store = opened(ttl_seconds=80, clock=lambda: now[0])
    store.tend()
    assert held(store, [1, 2]) == [2]
    assert store.stats().expired_frames == 1
    now[0] += 15
    store.tend()
    assert store.stats().frames == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_is_read_and_not_written_until_later(opened, number):
    now, broken = [0.0], []

    def writev(fd, pieces):
        if broken:
            os.write(fd, pieces[0][: SIZE // 2])  # part of it got there
            raise OSError(number, os.strerror(number))
        return os.writev(fd, pieces)

    store = opened(monotonic=lambda: now[0], writev=writev)
    store.put(entries([1, 2]))
    broken.append(True)
    store.put(entries([3, 4]))
    counts = store.stats()
    assert (counts.errors, counts.dropped_frames, store.ready()) == (1, 2, False)
    assert counts.state.startswith("read-only")
    assert ("full" in counts.state) == (number != errno.EIO)
    broken.clear()
    store.put(entries([5]))
    assert fetched(store, range(6)) == {number: frame(number) for number in (1, 2)}
    now[0] += READ_ONLY_SECONDS
    store.put(entries([5]))
    assert store.stats().state == "ok"
    store = opened()
    assert fetched(store, range(6), whole) == {number: frame(number) for number in (1, 2, 5)}


def limited(path, room):
    """A `writev` of a file system that has `room[0]` bytes for segments."""

    def writev(fd, pieces):
        if sum(each.stat().st_size for each in segments(path)) + sum(map(len, pieces)) > room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.writev(fd, pieces)

    return writev


@pytest.mark.parametrize("set_by", [-86400.0, -30.0, 3600.0])
def test_a_clock_that_is_set_changes_nothing_of_how_long_a_failing_disk_is_only_read(opened, set_by):
    now, wall, broken = [0.0], [1e9], [errno.EIO]

    def writev(fd, pieces):
        if broken:
            raise OSError(broken.pop(), "broken")
        return os.writev(fd, pieces)

    store = opened(clock=lambda: wall[0], monotonic=lambda: now[0], writev=writev)
    store.put(entries([1]))
    wall[0] += set_by
    now[0] += READ_ONLY_SECONDS - 1
    assert not store.ready()
    now[0] += 1
    assert store.ready()
    store.put(entries([1]))
    assert store.stats().state == "ok"


def test_a_full_disk_gets_no_empty_segments_however_often_a_write_is_tried_again(opened, tmp_path):
    now, room = [0.0], [0]
    store = opened(monotonic=lambda: now[0], writev=limited(tmp_path, room))
    for _ in range(5):
        store.put(entries([1]))
        assert (segments(tmp_path), store.stats().bytes, store.ready()) == ([], 0, False)
        now[0] += READ_ONLY_SECONDS
    room[0] = BUDGET
    store.put(entries([1]))
    assert (held(store, [1]), store.stats().state) == ([1], "ok")


def test_on_a_disk_that_stays_full_below_the_budget_older_frames_give_way_to_newer_ones(opened, tmp_path):
    now, room = [0.0], [20 * SIZE]
    store = opened(400 * SIZE, monotonic=lambda: now[0], writev=limited(tmp_path, room))
    for number in range(25):
        store.put(entries([number]))
    first = held(store, range(25))
    assert first == list(range(19))
    assert store.stats().state.startswith("read-only")
    now[0] += READ_ONLY_SECONDS
    for number in range(100, 200):
        store.put(entries([number]))
    errors = store.stats().errors
    assert (errors, store.stats().state) == (2, "ok")
    assert held(store, range(25)) == []
    kept = held(store, range(100, 200))
    assert kept == list(range(200 - len(kept), 200))
    assert len(kept) >= 10
    assert sum(path.stat().st_size for path in segments(tmp_path)) == store.stats().bytes <= room[0]
    room[0] = 400 * SIZE
    now[0] += FULL_SECONDS
    for number in range(200, 300):
        store.put(entries([number]))
    assert held(store, range(200, 300)) == list(range(200, 300))


def test_a_disk_that_others_keep_full_costs_a_segment_a_minute_at_most(opened, tmp_path):
    now, room = [0.0], [BUDGET]
    store = opened(segment_bytes=3 * SIZE + HEAD.size, monotonic=lambda: now[0], writev=limited(tmp_path, room))
    store.put(entries(range(12)))
    room[0] = 0
    for number in range(20, 50):
        store.put(entries([number]))
    assert held(store, range(50)) == list(range(12))
    now[0] += READ_ONLY_SECONDS
    for number in range(20, 50):
        store.put(entries([number]))
    assert held(store, range(50)) == list(range(3, 12))
    assert not store.ready()


def test_a_disk_that_writes_slowly_is_read_meanwhile(opened):
    writing, written = threading.Event(), threading.Event()

    def writev(fd, pieces):
        if writing.is_set():
            assert written.wait(60)
        return os.writev(fd, pieces)

    store = opened(writev=writev)
    store.put(entries([1, 2]))
    writing.set()
    putting = threading.Thread(target=store.put, args=(entries([3]),))
    putting.start()
    with ThreadPoolExecutor(1) as beside:
        try:
            found = beside.submit(lambda: (fetched(store, [1, 2, 3]), held(store, [1, 3]), store.stats().frames))
            assert found.result(20) == ({number: frame(number) for number in (1, 2)}, [1], 2)
        finally:
            written.set()
            putting.join()
    assert fetched(store, [3]) == {3: frame(3)}


def test_a_disk_on_which_nothing_can_be_removed_any_more_is_read(opened, monkeypatch):
    store = opened(12 * SIZE, segment_bytes=3 * SIZE + HEAD.size)
    store.put(entries(range(9)))

    def read_only(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", read_only)
        store.put(entries([9]))  # for which another segment has to give way
        counts = store.stats()
        assert (counts.evicted_frames, counts.dropped_frames, counts.errors) == (0, 1, 1)
        assert counts.state.startswith("read-only")
        assert fetched(store, range(10)) == {number: frame(number) for number in range(9)}
        store = opened(6 * SIZE, segment_bytes=3 * SIZE + HEAD.size)
        assert fetched(store, range(9)) == {number: frame(number) for number in range(9)}
        assert "Read-only file system" in store.flush()
        assert fetched(store, range(9)) == {}


def test_a_file_system_that_is_full_for_real_is_read_only(tmp_path):
    """A process of its own, whose files may not grow further."""
    code = f"""
        import resource, signal
        from pathlib import Path
        from engine.frame_tiers.disk.disk_store import DiskStore
        from tests.unit.engine.frame_tiers.frames import SIZE, entries, fetched, frame
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(2.5 * SIZE), int(2.5 * SIZE)))
        store = DiskStore(Path({str(tmp_path)!r}), 1 << 20)
        store.put(entries([1]))
        store.put(entries([2, 3, 4]))
        counts = store.stats()
        print(counts.errors, counts.dropped_frames, counts.frames, fetched(store, [1, 2]) == {{1: frame(1)}})
    """
    told = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, check=True, timeout=60)
    assert told.stdout == b"1 3 1 True\n"


def test_each_flipped_byte_is_a_miss_or_leaves_the_frame_as_it_was(opened, tmp_path):
    store = opened()
    store.put(entries([1, 2, 3]))
    store = opened()
    path = segments(tmp_path)[0]
    for place in range(HEAD.size, HEAD.size + 3 * SIZE):
        flip(path, place)
        found = fetched(store, [1, 2, 3])
        assert [number for number, data in found.items() if not whole(number, data)] == [1 + (place - HEAD.size) // SIZE]
        flip(path, place)


def test_a_flipped_byte_before_a_start_is_a_miss_and_never_another_frame(opened, tmp_path):
    opened().put(entries([1, 2, 3]))
    opened().close()
    path = segments(tmp_path)[0]
    original = path.read_bytes()
    for place in [*range(HEAD.size + 80), *range(HEAD.size + SIZE, HEAD.size + SIZE + 80)]:
        path.write_bytes(original)
        flip(path, place)
        store = opened()
        found = {n: data for n, data in fetched(store, [1, 2, 3], whole).items() if whole(n, data)}
        assert set(found) <= {1, 2, 3}
        assert all(data == frame(number) for number, data in found.items())
        counts = store.stats()
        dated = 8 <= place < HEAD.size  # when it was begun: no frame's byte
        assert bool(counts.errors + counts.damaged_frames + counts.missed_frames) != dated
        if not path.exists():  # its first bytes said that it is no segment
            path.write_bytes(original)


@pytest.mark.parametrize("place", [0, HEAD.size, HEAD.size + 4, HEAD.size + SIZE + 1])
def test_a_header_that_was_flipped_before_a_start_is_counted_then(opened, tmp_path, place):
    opened().put(entries([1, 2, 3]))
    opened().close()
    flip(segments(tmp_path)[0], place)
    store = opened()
    assert store.stats().errors == 1
    assert store.stats().state == "ok"
    assert fetched(store, [1, 2, 3], whole) == ({1: frame(1)} if place > HEAD.size + SIZE else {})


def flip(path, place):
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


def test_a_damaged_frame_is_counted_and_not_there_any_more_also_after_a_restart(opened, tmp_path):
    store = opened()
    store.put(entries([1, 2]))
    flip(segments(tmp_path)[0], HEAD.size + 100)
    fetched(store, [1, 2], whole)
    for _ in range(2):
        assert held(store, [1, 2]) == [2]
        assert fetched(store, [1, 2], whole) == {2: frame(2)}
        store = opened()
    store.put(entries([1]))
    assert fetched(store, [1], whole) == {1: frame(1)}


@pytest.mark.parametrize("left", [0, 5, HEAD.size, HEAD.size + 20, HEAD.size + SIZE, HEAD.size + 2 * SIZE - 1])
def test_a_truncated_segment_gives_what_is_whole(opened, tmp_path, left):
    opened().put(entries([1, 2, 3]))
    opened().close()
    os.truncate(segments(tmp_path)[0], left)
    store = opened()
    assert store.stats().errors == (left not in (HEAD.size, HEAD.size + SIZE))  # what ends with a frame is whole
    kept = [number for number in (1, 2, 3) if HEAD.size + number * SIZE <= left]
    assert fetched(store, [1, 2, 3], whole) == {number: frame(number) for number in kept}
    store.put(entries([4]))
    assert held(opened(), range(5)) == [*kept, 4]


def test_segments_that_vanish_or_shrink_while_it_runs_are_misses(opened, tmp_path):
    store = opened(segment_bytes=2 * SIZE + HEAD.size)
    store.put(entries(range(6)))
    first, second, _ = segments(tmp_path)
    first.unlink()
    os.truncate(second, HEAD.size + SIZE + 10)
    assert fetched(store, range(6), whole) == {number: frame(number) for number in (2, 4, 5)}
    assert store.stats().errors == 1
    assert held(store, range(6))[0] == 2
    store.put(entries([0]))
    assert fetched(store, [0]) == {0: frame(0)}


def test_two_writers_of_one_directory_are_refused(opened, tmp_path):
    store = opened()
    with pytest.raises(StoreRefused, match="in use by another peerkv"):
        DiskStore(tmp_path, BUDGET, lock_seconds=0.1)
    store.put(entries([1]))
    store.close()
    other = DiskStore(tmp_path, BUDGET, lock_seconds=0.1)
    assert held(other, [1]) == [1]
    other.close()


def test_a_directory_that_cannot_be_is_refused_with_a_word(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreRefused, match="cannot be used"):
        DiskStore(tmp_path / "file" / "below", BUDGET)


def test_what_others_put_into_the_directory_stays(opened, tmp_path):
    (tmp_path / "mine.frames").write_text("not yours")
    (tmp_path / "notes").write_text("not yours")
    store = opened()
    store.put(entries([1]))
    assert store.flush() == ""
    store = opened()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "mine.frames", "notes"]


def test_a_flush_removes_everything_and_goes_on(opened, tmp_path):
    store = opened()
    store.put(entries(range(5)))
    assert store.flush() == ""
    assert (segments(tmp_path), store.stats().frames, store.stats().bytes) == ([], 0, 0)
    store.put(entries([1]))
    assert held(opened(), range(5)) == [1]


def test_what_was_forgotten_and_written_again_goes_with_its_segment(opened, tmp_path):
    store = opened()
    for _ in range(2):
        store.put(entries([1, 2]))
        store.remove(ids([1]))
    store.put(entries([1]))
    assert store.flush() == ""
    assert (segments(tmp_path), store.stats().frames) == ([], 0)


def test_past_the_deadline_everything_is_missed(opened):
    store = opened()
    store.put(entries([1]))
    assert fetched(store, [1], deadline=0.0) == {}
    assert fetched(store, [1]) == {1: frame(1)}


def test_frames_larger_than_a_read_are_read(opened):
    store = opened(64 << 20)
    store.put([(ids([n])[0], frame(n) + bytes(5 << 20)) for n in (1, 2)])
    assert {number: len(data) for number, data in fetched(store, [1, 2]).items()} == dict.fromkeys((1, 2), SIZE + (5 << 20))
