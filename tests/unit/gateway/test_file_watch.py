"""Files watched for changes: what is taken up when, and what the log is told."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from gateway.errors import SettingsError
from gateway.file_watch import RETRY_LOOKS, FileWatch


class Reader:
    """Takes a file's text; raises what it is told to."""

    def __init__(self, path: Path) -> None:
        self.path, self.tried = path, 0
        self.taken: list[str] = []
        self.error: Exception | None = None

    async def __call__(self) -> str:
        self.tried += 1
        if self.error is not None:
            raise self.error
        try:
            self.taken.append(self.path.read_text())
        except OSError as error:
            raise SettingsError(f"cannot read it: {error.strerror}") from None
        return "it was read again"


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    path = tmp_path / "file"
    path.write_text("one")
    return Reader(path)


def watch(reader: Reader) -> FileWatch:
    return FileWatch([reader.path], reader, "the old one stays")


async def test_an_unchanged_file_is_read_again_only_when_asked(reader: Reader, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = watch(reader)
    await found.look()
    await found.look()
    assert (reader.taken, caplog.messages) == (["one"], [])
    found.reload()
    await found.look()
    await found.look()
    assert (reader.taken, caplog.messages) == (["one", "one"], ["it was read again"])


async def test_a_reload_that_is_asked_for_during_a_look_is_not_lost(reader: Reader) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> str:
        begun.set()
        await go_on.wait()
        return await reader()

    found = FileWatch([reader.path], slow, "the old one stays")
    looking = asyncio.create_task(found.look())
    await begun.wait()
    found.reload()
    go_on.set()
    await looking
    await found.look()
    assert reader.taken == ["one", "one"]


async def test_a_file_that_is_gone_is_told_of_once_and_taken_when_it_is_back(
    reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = watch(reader)
    await found.look()
    reader.path.unlink()
    for _ in range(3):
        await found.look()
    assert caplog.messages == ["cannot read it: No such file or directory; the old one stays"]
    reader.path.write_text("two")
    await found.look()
    assert reader.taken == ["one", "two"]
    assert caplog.messages[1:] == ["it was read again"]


async def test_what_could_not_be_used_for_a_while_is_taken_without_a_change(reader: Reader) -> None:
    found = watch(reader)
    await found.look()
    reader.path.write_text("two")
    reader.error = SettingsError("too many open files")
    await found.look()
    reader.error = None
    for _ in range(RETRY_LOOKS - 1):
        await found.look()
    assert (reader.taken, reader.tried) == (["one"], 2)
    await found.look()
    assert reader.taken == ["one", "two"]


async def test_any_other_exception_leaves_the_change_to_the_next_look(reader: Reader) -> None:
    found = watch(reader)
    reader.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        await found.look()
    reader.error = None
    await found.look()
    assert reader.taken == ["one"]
