import errno
import os
from pathlib import Path

import pytest

from engine.host_process.directories import MARKER, DirectoryRefused, claim, claim_all, release, remove_claimed, wait_until_free


def test_a_claimed_directory_is_private_and_goes_with_all_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "a" / "8000"
    held = claim(path, 0)
    assert path.stat().st_mode & 0o777 == 0o700
    (path / "x.sock").touch()
    (path / "sub").mkdir()
    (path / "sub" / "y").touch()
    release([held])
    assert not path.exists()


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    held = claim(tmp_path / "d", 0)
    with pytest.raises(DirectoryRefused, match="in use"):
        claim(tmp_path / "d", 0)
    release([held])
    release([claim(tmp_path / "d", 0)])


async def test_a_directory_in_use_is_told_at_once_and_waited_for(tmp_path: Path) -> None:
    path, free = tmp_path / "d", tmp_path / "free"
    held = claim(path, 0)
    said: list[str] = []
    with pytest.raises(DirectoryRefused, match=f"{path} is in use"):
        await wait_until_free([free, path], 0.0, said.append)
    await wait_until_free([free, path], 30.0, lambda words: (said.append(words), release([held]))[0])
    assert len(said) == 1
    assert said[0].startswith(f"{path} is in use by another running peerkv: waiting up to 30 s")
    assert not free.exists()
    release([claim(path, 0)])


def test_where_nothing_can_be_locked_that_is_said_and_no_descriptor_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("engine.host_process.directories.fcntl.flock", no_locks)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DirectoryRefused, match="cannot be locked: No locks available"):
        claim(tmp_path / "d", 0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_a_killed_owner_left_is_cleared(tmp_path: Path) -> None:
    held = claim(tmp_path / "d", 0)
    (tmp_path / "d" / "stale.table").touch()
    os.close(held.lock_fd)  # as the kernel does for a killed process
    again = claim(tmp_path / "d", 0)
    assert os.listdir(tmp_path / "d") == [MARKER]
    release([again])


def test_a_directory_with_files_of_others_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DirectoryRefused, match="files that are not peerkv's"):
        claim(tmp_path, 0)
    assert not remove_claimed(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(DirectoryRefused):
        claim(tmp_path / "link", 0)


def test_a_link_inside_is_removed_and_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").touch()
    held = claim(tmp_path / "d", 0)
    (tmp_path / "d" / "link").symlink_to(outside)
    release([held])
    assert (outside / "keep").exists()
    assert not (tmp_path / "d").exists()


def test_a_place_that_others_can_change_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(DirectoryRefused, match="other users"):
        claim(tmp_path / "open" / "d", 0)


def test_when_one_of_several_is_refused_none_is_kept(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(DirectoryRefused):
        claim_all([tmp_path / "a", tmp_path / "b"], 0)
    assert not (tmp_path / "a").exists()
