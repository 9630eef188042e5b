"""The file of the request log: what is written, dropped, followed and closed."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from gateway.errors import SettingsError
from gateway.stats import log_file
from gateway.stats.log_file import LogFile
from tests.unit.gateway.running_door import until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "FLUSH_SECONDS", 0.005)


async def test_lines_are_appended_to_a_file_that_only_its_owner_may_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for line in (b"one\n", b"two\n"):
        file = LogFile(str(path))
        file.put(line)
        await file.close()
    assert path.read_bytes() == b"one\ntwo\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert (file.written, file.dropped) == (1, 0)


@pytest.mark.parametrize("away", [lambda path: path.rename(path.with_suffix(".1")), lambda path: path.unlink()])
async def test_a_file_that_was_moved_or_removed_is_made_anew(tmp_path: Path, away: object) -> None:
    path = tmp_path / "log"
    file = LogFile(str(path))
    file.put(b"one\n")
    await until(lambda: file.written == 1)
    away(path)
    file.put(b"two\n")
    await file.close()
    assert path.read_bytes() == b"two\n"


async def test_a_file_that_was_emptied_is_written_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = LogFile(str(path))
    file.put(b"one\n")
    await until(lambda: file.written == 1)
    os.truncate(path, 0)
    file.put(b"two\n")
    await file.close()
    assert path.read_bytes() == b"two\n"


async def test_a_full_disk_costs_lines_which_are_counted_and_complained_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = True

    def write(descriptor: int, data: bytes) -> int:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(descriptor, data)

    path = tmp_path / "log"
    file = LogFile(str(path), write)
    for count in (1, 2):
        file.put(b"lost\n")
        await until(lambda count=count: file.dropped == count)
    full = False
    file.put(b"kept\n")
    await file.close()
    assert path.read_bytes() == b"kept\n"
    assert (file.written, file.dropped) == (1, 2)
    said = [record.message for record in caplog.records]
    assert ["No space left" in line for line in said] == [True, False]
    assert "is written again; 2 lines were dropped" in said[1]


async def test_a_line_that_the_disk_had_no_room_for_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    room = 6

    def write(descriptor: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = os.write(descriptor, data[:room])
        room -= done
        return done

    path = tmp_path / "log"
    file = LogFile(str(path), write)
    file.put(b"one\ntwo\n")
    await until(lambda: file.dropped)
    room = 100
    file.put(b"three\n")
    await file.close()
    assert path.read_bytes() == b"one\ntw\nthree\n"


async def test_a_disk_that_does_not_answer_holds_up_neither_requests_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_file, "LINES_MAX", 3)
    monkeypatch.setattr(log_file, "CLOSE_SECONDS_MAX", 0.01)
    hangs, goes_on = threading.Event(), threading.Event()

    def write(descriptor: int, data: bytes) -> int:
        hangs.set()
        goes_on.wait(10)
        return os.write(descriptor, data)

    file = LogFile(str(tmp_path / "log"), write)
    file.put(b"first\n")
    await until(hangs.is_set)
    for _ in range(5):
        file.put(b"next\n")
    assert file.dropped == 2
    await file.close()
    assert file.written == 0
    goes_on.set()
    await until(lambda: file.written == 4)


@pytest.mark.parametrize("name", ["no/such/directory", "."])
def test_a_path_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    with pytest.raises(SettingsError, match="request_log: cannot write") as error:
        LogFile(path)
    assert path in str(error.value)


def test_a_pipe_that_nobody_reads_is_an_error_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SettingsError):
        LogFile(str(tmp_path / "pipe"))
