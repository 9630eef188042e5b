"""Host memory in named files: what was stored is there for the next keeper, unless anything about it is in doubt."""

import asyncio
import os
from contextlib import closing
from pathlib import Path

import pytest

from engine.host_process import named_memory
from engine.host_process.named_memory import named_bytes
from tests.unit.engine.keeper import Keeper
from tests.unit.transport.table_fixtures import description
from transport.backends.shared_memory import map_region
from transport.keys import chain_keys, root_key
from transport.table.kept_table import KeptTable
from transport.table.reader import TableReader
from transport.table.tiers import host_memory_of

NAME, SIZE = "replica-0", 1 << 16
KEYS = chain_keys(root_key(b"f" * 16), range(16), 4)


class Start:
    """One start of everything: block tables in a directory of its own, `files` those that stay."""

    def __init__(self, place: Path, number: int, size: int = SIZE, **about: object) -> None:
        self.table_dir = place / f"tables-{number}"
        self.table_dir.mkdir()
        self.keeper = Keeper(self.table_dir)
        self.kept = self.keeper.keep(NAME, size, place / "files")
        self.table = self.make_table(**about)

    def make_table(self, **about: object) -> KeptTable:
        """As a replica does, at each of its starts."""
        told = description(host_memory_of(NAME), **about)
        return KeptTable(self.table_dir, told, 4, 4, Path(self.kept.draft), Path(self.kept.second_name))

    def store(self) -> None:
        with map_region(self.kept.region, writable=True) as memory:
            memory[:5] = b"block"
        self.table.publish([2], KEYS[:1])

    def end(self) -> None:
        """As at the end of everything: its tables are removed."""
        self.keeper.end()
        for path in self.table_dir.iterdir():
            path.unlink()

    def held(self) -> bool:
        with closing(TableReader(self.table.path)) as reader:
            return reader.alive() and bool(reader.look_up(KEYS[:1])[0].any())


@pytest.fixture
def first(tmp_path):
    start = Start(tmp_path, 1)
    start.store()
    start.end()
    return start


def test_what_was_stored_is_there_after_a_restart_of_everything_and_after_one_more(first, tmp_path):
    for number in (2, 3):
        again = Start(tmp_path, number)
        assert again.held()
        with map_region(again.kept.region) as memory:
            assert memory[:5] == b"block"
        assert again.kept.region == first.kept.region
        again.end()


def test_a_replica_that_starts_again_meanwhile_goes_on_with_it(first, tmp_path):
    again = Start(tmp_path, 2)
    again.kept = again.keeper.keep(NAME, SIZE, tmp_path / "files")
    again.table = again.make_table()
    assert again.held()


def test_of_another_model_nothing_is_believed_and_its_own_is_there_after_the_next_restart(first, tmp_path):
    other = Start(tmp_path, 2, fields={"weights": "w2"})
    assert not other.held()
    other.store()
    other.end()
    assert Start(tmp_path, 3, fields={"weights": "w2"}).held()


def test_of_another_size_or_another_start_of_the_machine_nothing_is_believed(first, tmp_path, monkeypatch):
    larger = Start(tmp_path, 2, size=2 * SIZE)
    assert not larger.held()
    larger.store()
    larger.end()
    (tmp_path / "boot").write_text("another")
    monkeypatch.setattr(named_memory, "BOOT_ID", tmp_path / "boot")
    assert not Start(tmp_path, 3, size=2 * SIZE).held()


def test_files_in_use_are_refused(tmp_path):
    using = Start(tmp_path, 1)
    with pytest.raises(BlockingIOError, match="another peerkv keeps host memory of replica-0 there"):
        Start(tmp_path, 2)
    using.store()
    using.end()
    assert Start(tmp_path, 3).held()


async def test_who_waits_for_files_in_use_goes_on_when_their_user_ends_or_the_time_is_over(tmp_path):
    using = Start(tmp_path, 1)
    await named_memory.wait_until_unused(tmp_path / "files", ["replica-1"], 0.0)
    with pytest.raises(BlockingIOError, match="another peerkv keeps host memory of replica-0 there"):
        await named_memory.wait_until_unused(tmp_path / "files", ["replica-1", NAME], 0.0)
    waiting = asyncio.create_task(named_memory.wait_until_unused(tmp_path / "files", [NAME], 30.0))
    await asyncio.sleep(0)  # until it waits
    assert not waiting.done()
    using.end()
    await waiting
    assert Start(tmp_path, 2).kept.region == using.kept.region


def test_memory_that_there_is_not_is_refused_and_not_found_out_by_a_signal(tmp_path, monkeypatch):
    def full(fd: int, begin: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Start(tmp_path, 1)


def test_the_directory_must_be_ours_alone_and_in_the_memory_of_the_tables(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="nobody else can enter"):
        named_memory.prepare(tmp_path / "open", tmp_path)
    with pytest.raises(OSError, match=r"must be on the file system of the block tables, /proc/self"):
        named_memory.prepare(tmp_path / "files", Path("/proc/self"))


def test_what_the_files_take_is_told(first, tmp_path):
    assert named_bytes(tmp_path / "files", [NAME]) >= SIZE
    assert named_bytes(tmp_path / "files", ["replica-1"]) == named_bytes(tmp_path / "none", [NAME]) == 0


def test_an_engine_that_died_before_it_gave_its_table_the_second_name_loses_nothing(tmp_path):
    start = Start(tmp_path, 1)
    Path(start.kept.second_name).unlink()
    start.kept = start.keeper.keep(NAME, SIZE, tmp_path / "files")
    start.table = start.make_table()
    start.store()
    start.end()
    assert Start(tmp_path, 2).held()


def test_a_table_of_another_version_has_lost_its_name_before_the_memory_is_anybody_elses(first, tmp_path, monkeypatch):
    second_name = tmp_path / "files" / f"{NAME}.table"
    version = bytearray(second_name.read_bytes())
    version[8] += 1
    second_name.write_bytes(version)
    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        Start(tmp_path, 2)
    assert not second_name.exists()


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_lock_with_more_in_it_than_the_start_of_the_machine_is_mended(first, tmp_path):
    with (tmp_path / "files" / f"{NAME}.lock").open("ab") as lock:
        lock.write(b"rubbish" * 9)
    again = Start(tmp_path, 2)
    assert not again.held()
    again.store()
    again.end()
    assert Start(tmp_path, 3).held()


def test_a_table_that_can_not_be_entered_is_let_go(first, tmp_path):
    before = sorted(os.listdir("/proc/self/fd"))
    (tmp_path / "tables-2").touch()  # no directory
    with pytest.raises(NotADirectoryError):
        named_memory.open_named_memory(tmp_path / "files", NAME, SIZE, tmp_path / "tables-2")
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert Start(tmp_path, 3).held()


@pytest.mark.parametrize("content", [b"", b"x", bytes(1 << 16), b"\xff" * (1 << 16), None])
def test_a_table_of_rubbish_is_replaced(first, tmp_path, content):
    second_name = tmp_path / "files" / f"{NAME}.table"
    second_name.write_bytes(second_name.read_bytes()[:8192] if content is None else content)
    again = Start(tmp_path, 2)
    assert not again.held()
    again.store()
    again.end()
    assert Start(tmp_path, 3).held()
