"""Reads from the disk go past the page cache where the file system has that, and through it where it has not."""

import errno
import fcntl
import os

import pytest

from engine.frame_tiers.disk.reading import ALIGN, read_stretch

CONTENT = os.urandom(3 * ALIGN + 700)  # which does not end where a page does
PLACES = [(16, 5000), (5016, ALIGN), (9200, len(CONTENT) - 9200)]


@pytest.fixture
def segment(tmp_path):
    path = tmp_path / "0000000001.frames"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def directly(monkeypatch):
    """Whether each read of this test went past the page cache, as the descriptor itself says."""
    found, read = [], os.preadv

    def preadv(fd, buffers, offset):
        found.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return found


def come_back(segment):
    found = {}
    read_stretch(segment, PLACES, lambda number, data: found.update({number: bytes(data)}))
    return found == {number: CONTENT[offset : offset + size] for number, (offset, size) in enumerate(PLACES)}


def has_direct_reads(path):
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_frames_are_read_past_the_page_cache_where_the_file_system_has_that(segment, directly):
    if not has_direct_reads(segment):
        pytest.skip(f"no O_DIRECT at {segment}")
    assert come_back(segment)
    assert directly == [True]


def test_a_file_system_that_refuses_to_open_so_is_read_through_the_page_cache(segment, directly, monkeypatch):
    really = os.open

    def refusing(path, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return really(path, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    assert come_back(segment)
    assert directly == [False]


def test_so_is_one_that_opens_so_and_does_not_read_so_and_no_descriptor_is_left(segment, monkeypatch):
    read, refused = os.preadv, []

    def refusing(fd, buffers, offset):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refusing)
    before = len(os.listdir("/proc/self/fd"))
    assert come_back(segment)
    assert len(refused) == has_direct_reads(segment)
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_error_is_told_and_not_tried_again(segment, monkeypatch):
    def failing(path, flags, *more):
        tries.append(flags)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    tries = []
    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(OSError, match="Input/output"):
        come_back(segment)
    assert len(tries) == 1
