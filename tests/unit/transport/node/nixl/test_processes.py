"""Whatever NIXL does or fails to do, a fetch ends in time and no memory that it may write is used for anything else."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
import pytest

from tests.unit.transport.node.nixl_nodes import NixlPair, ip, needs_namespaces, needs_nixl, nixl_pair
from tests.unit.transport.node.owners import BLOCKS, Owner
from tests.unit.waiting import until
from transport.node.block_client import BlockClient
from transport.node.block_fetcher import StillWritten
from transport.node.messages import MemoryOffered, NodeError
from transport.node.nixl import client as nixl_client
from transport.node.nixl import process as nixl_process
from transport.node.nixl.ability import Ability
from transport.node.nixl.client import NixlClient
from transport.node.nixl.orders import Know
from transport.node.nixl.process import NixlProcess
from transport.node.staging import Piece

UNTOUCHED = 0xEE


@pytest.fixture(scope="module", params=["on loopback", pytest.param("between namespaces", marks=needs_namespaces)])
def pair(request) -> Iterator[NixlPair]:
    with nixl_pair(apart=request.param == "between namespaces") as made:
        yield made


@contextmanager
def impatient() -> Iterator[None]:
    """Give up, and end processes, soon."""
    with (
        mock.patch.object(nixl_client, "PROGRESS_SECONDS", 0.3),
        mock.patch.object(nixl_process, "QUARANTINE_SECONDS_MAX", 0.5),
    ):
        yield


@pytest.fixture(autouse=True)
def _soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are ended here all the time."""
    monkeypatch.setattr(nixl_process, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(nixl_process, "PAUSE_SECONDS_MAX", 0.05)


@pytest.fixture
def owner(tmp_path: Path, pair: NixlPair) -> Iterator[Owner]:
    until(lambda: not pair.a.owning.trouble and not pair.b.reading.trouble, "both processes")
    made = Owner(tmp_path, None, pair.a.owner)
    yield made
    made.close()


@pytest.fixture
def fetcher(owner: Owner, pair: NixlPair) -> NixlClient:
    tcp = BlockClient("node-a", ("127.0.0.1", owner.server.port), None, "node-b", "test", pair.b.found.version)
    return pair.b.client(tcp)


def target(pair: NixlPair, owner: Owner) -> Piece:
    piece = pair.staging.take(BLOCKS, owner.bytes)
    assert piece is not None
    piece.rows[:] = UNTOUCHED
    return piece


def fetch(fetcher: NixlClient, owner: Owner, piece: Piece) -> None:
    assert fetcher.fetch(owner.asked(range(BLOCKS)), [owner.bytes] * BLOCKS, piece).good.all()
    assert [row.tobytes() for row in piece.rows] == [owner.block(block) for block in range(BLOCKS)]


def fetch_again(pair: NixlPair, fetcher: NixlClient, owner: Owner) -> None:
    """Once both processes are there, it works as before."""
    taken_bytes, piece = pair.staging.taken_bytes(), target(pair, owner)

    def works() -> bool:
        try:
            fetch(fetcher, owner, piece)
        except NodeError:
            return False
        return True

    until(works, "a fetch")
    pair.staging.give_back(piece)
    until(lambda: pair.staging.taken_bytes() <= taken_bytes, "the end of the quarantine")


@needs_nixl
def test_an_owners_node_that_stops_is_given_up_and_what_it_writes_late_hits_no_memory_in_use(
    pair: NixlPair, owner: Owner, fetcher: NixlClient
) -> None:
    fetch_again(pair, fetcher, owner)
    piece, life = target(pair, owner), pair.b.reading.life
    stop(pair.a.owning.pid)
    try:
        begun = time.monotonic()
        with mock.patch.object(nixl_client, "PROGRESS_SECONDS", 0.3), pytest.raises(StillWritten):
            fetcher.fetch(owner.asked(range(BLOCKS)), [owner.bytes] * BLOCKS, piece)
        assert time.monotonic() - begun < 2
        pair.staging.give_back(piece)
        assert pair.staging.taken_bytes() == piece.rows.size
        other = pair.staging.take(BLOCKS, owner.bytes)
        assert other is not None
        assert other.begin >= piece.end
        other.rows[:] = UNTOUCHED
    finally:
        os.kill(pair.a.owning.pid, signal.SIGCONT)
    until(lambda: pair.staging.taken_bytes() == other.rows.size, "the end of what was late")
    assert [row.tobytes() for row in piece.rows] == [owner.block(block) for block in range(BLOCKS)]  # it did come
    assert (other.rows == UNTOUCHED).all()
    assert pair.b.reading.life == life
    pair.staging.give_back(other)
    fetch_again(pair, fetcher, owner)


@needs_nixl
def test_a_process_in_which_a_read_stays_in_doubt_is_ended_and_writes_nothing_any_more(
    pair: NixlPair, owner: Owner, fetcher: NixlClient
) -> None:
    fetch_again(pair, fetcher, owner)
    piece, life = target(pair, owner), pair.b.reading.life
    stop(pair.a.owning.pid)
    try:
        with impatient():
            with pytest.raises(StillWritten):
                fetcher.fetch(owner.asked(range(BLOCKS)), [owner.bytes] * BLOCKS, piece)
            pair.staging.give_back(piece)
            until(lambda: pair.staging.taken_bytes() == 0, "the end of the quarantine")
        used_again = target(pair, owner)
        assert used_again.begin == piece.begin
    finally:
        os.kill(pair.a.owning.pid, signal.SIGCONT)
    until(lambda: pair.b.reading.life == life + 1, "another process")
    fetch_again(pair, fetcher, owner)  # the owner's node goes on: what was asked of it before would have come by now
    assert (used_again.rows == UNTOUCHED).all()
    pair.staging.give_back(used_again)


@needs_nixl
@pytest.mark.parametrize("which", ["owning", "reading"])
def test_a_process_that_is_killed_is_an_error_at_once_and_another_is_started(
    pair: NixlPair, owner: Owner, fetcher: NixlClient, which: str
) -> None:
    fetch_again(pair, fetcher, owner)
    process: NixlProcess = pair.a.owning if which == "owning" else pair.b.reading
    life, piece = process.life, target(pair, owner)
    os.kill(process.pid, signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(NodeError):
        fetcher.fetch(owner.asked(range(BLOCKS)), [owner.bytes] * BLOCKS, piece)
    assert time.monotonic() - begun < 2
    pair.staging.give_back(piece)
    until(lambda: process.life == life + 1 and not process.trouble, "another process")
    with impatient():
        until(lambda: pair.staging.taken_bytes() == 0, "the end of the quarantine")
    fetch_again(pair, fetcher, owner)


@needs_nixl
def test_a_reading_process_that_is_stuck_is_ended(pair: NixlPair, owner: Owner, fetcher: NixlClient) -> None:
    fetch_again(pair, fetcher, owner)
    piece, life = target(pair, owner), pair.b.reading.life
    stop(pair.b.reading.pid)
    with impatient():
        with pytest.raises(StillWritten):
            fetcher.fetch(owner.asked(range(BLOCKS)), [owner.bytes] * BLOCKS, piece)
        pair.staging.give_back(piece)
        until(lambda: pair.b.reading.life == life + 1, "another process")
    fetch_again(pair, fetcher, owner)


@needs_nixl
def test_a_link_that_is_down_is_given_up_and_used_again_when_it_is_back(
    pair: NixlPair, owner: Owner, fetcher: NixlClient
) -> None:
    if pair.spaces is None:
        pytest.skip("there is no link")
    fetch_again(pair, fetcher, owner)
    piece, space = target(pair, owner), pair.spaces[0]
    ip("-n", space, "link", "set", space, "down")
    try:
        with impatient():
            with pytest.raises(NodeError):
                fetcher.fetch(owner.asked(range(BLOCKS)), [owner.bytes] * BLOCKS, piece)
            pair.staging.give_back(piece)
            until(lambda: pair.staging.taken_bytes() == 0, "the end of the quarantine")
    finally:
        ip("-n", space, "link", "set", space, "up")
    fetch_again(pair, fetcher, owner)


@needs_nixl
def test_closing_a_fetcher_ends_its_fetches(pair: NixlPair, owner: Owner, fetcher: NixlClient) -> None:
    fetch_again(pair, fetcher, owner)
    piece, ended = target(pair, owner), []
    stop(pair.a.owning.pid)

    def fetching() -> None:
        try:
            fetcher.fetch(owner.asked(range(BLOCKS)), [owner.bytes] * BLOCKS, piece)
        except StillWritten:
            ended.append(time.monotonic())

    try:
        thread = threading.Thread(target=fetching)
        thread.start()
        until(lambda: fetcher._begun, "a read")
        begun = time.monotonic()
        fetcher.close()
        thread.join(5)
        assert ended
        assert ended[0] - begun < 1
    finally:
        os.kill(pair.a.owning.pid, signal.SIGCONT)
    pair.staging.give_back(piece)
    until(lambda: pair.staging.taken_bytes() == 0, "the end of what was late")


class Damaging(BlockClient):
    """Damages the metadata that a node offers."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.random = np.random.default_rng(7)

    def ask(self, message):
        answer = super().ask(message)
        if isinstance(answer, MemoryOffered):
            damaged = bytearray(answer.metadata)
            for _ in range(3):
                damaged[self.random.integers(len(damaged))] = self.random.integers(256)
            return msgspec.structs.replace(answer, metadata=bytes(damaged[: self.random.integers(1, len(damaged) + 300)]))
        return answer


@needs_nixl
def test_metadata_that_is_garbage_gives_no_wrong_block_and_is_got_over(
    pair: NixlPair, owner: Owner, fetcher: NixlClient
) -> None:
    """NIXL may keep half of it; then the process that took it in is ended."""
    fetch_again(pair, fetcher, owner)
    lying = pair.b.client(Damaging("node-a", ("127.0.0.1", owner.server.port), None, "node-b", "test", pair.b.found.version))
    refused = 0
    for _ in range(5):
        until(lambda: not pair.b.reading.trouble, "a process")
        piece = target(pair, owner)
        with impatient():
            try:
                fetch(lying, owner, piece)
            except NodeError:
                refused += 1
            pair.staging.give_back(piece)
            until(lambda: pair.staging.taken_bytes() == 0, "the end of the quarantine")
    assert refused
    fetch_again(pair, fetcher, owner)


@needs_nixl
def test_a_read_beyond_our_memory_is_refused(pair: NixlPair, owner: Owner, fetcher: NixlClient) -> None:
    fetch_again(pair, fetcher, owner)
    known = next(iter(fetcher._known.values()))
    process = pair.b.reading
    for offset, length in ((pair.staging.region.size, 8), (pair.staging.region.size - 4, 8), (2**64 - 8, 16)):
        spans = np.array([[offset, known.offered.layers[0].address, length]], "<u8").tobytes()
        transfer = process.read(known.agent, spans, process.life)
        with pytest.raises(NodeError, match="beyond our memory"):
            transfer.wait(5)
        assert transfer.over
    assert not process.trouble


@needs_nixl
def test_idle_processes_burn_no_core(pair: NixlPair, owner: Owner, fetcher: NixlClient) -> None:
    fetch_again(pair, fetcher, owner)
    pids = [pair.a.owning.pid, pair.b.reading.pid]
    before = [ticks(pid) for pid in pids]
    time.sleep(1)  # what is measured is a stretch of time
    used = [ticks(pid) - earlier for pid, earlier in zip(pids, before, strict=True)]
    assert max(used) <= 0.1 * os.sysconf("SC_CLK_TCK")


def stop(pid: int) -> None:
    """Stop a process, all of its threads: the first to be scheduled tells the others."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    until(lambda: all(") T " in (task / "stat").read_text() for task in tasks.iterdir()), "the stop")


def ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_where_nixl_cannot_be_loaded_that_is_said_and_nothing_else_happens() -> None:
    process = NixlProcess("nobody", Ability("1", "", "nixl_none"), dict(os.environ), None)
    process.start()
    try:
        until(lambda: "nixl_none" in process.trouble, "the reason")
        with pytest.raises(NodeError, match="nixl_none"):
            process.ask(Know(1, "somebody", b""))
        with pytest.raises(NodeError):
            process.read("somebody", b"", 0)
    finally:
        process.close()
    assert process.pid == 0


PARENT = """
import os, sys, time
from transport.node.nixl.ability import ability
from transport.node.nixl.process import NixlProcess
process = NixlProcess("orphan", ability("nixl"), dict(os.environ), None)
process.start()
while process.trouble:
    time.sleep(0.01)
print(process.pid, flush=True)
time.sleep(60)
"""


@needs_nixl
def test_a_process_ends_with_its_agent_however_that_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        pid = int(agent.stdout.readline())
        agent.kill()
        until(lambda: not Path(f"/proc/{pid}").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text(), "its end")
