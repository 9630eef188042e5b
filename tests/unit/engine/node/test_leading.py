"""Requests are led to another node's replicas byte for byte, and whoever is no node of ours gets nothing."""

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from engine.fleet import FLEET_FILE, FleetSnapshot, Replica, ReplicaState, write_fleet
from engine.joined_fleet import read_nodes
from tests.unit.engine.node.two_nodes import Node, nodes
from tests.unit.waiting import until
from transport.node.keys import client_context, make_keys
from transport.node.messages import Hello, NodeError
from transport.node.sockets import call

LARGE = os.urandom(3 << 20)


class Server:
    """A replica's server on a unix socket: sends back what it gets, and notes when a connection ends."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.ended = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while data := connection.recv(1 << 16):
                connection.sendall(data)
        self.ended.set()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    with nodes(tmp_path, "node-a", "node-b") as (a, b):
        a.start(b.peer)
        b.start(a.peer)
        yield a, b


@pytest.fixture
def server(pair: tuple[Node, Node]) -> Iterator[Server]:
    a = pair[0]
    with closing(Server(a.run / "r0")) as made:
        serves(a, made.path)
        yield made


def serves(node: Node, path: str, state: ReplicaState = ReplicaState.READY, name: str = "replica-0") -> None:
    replica = Replica(name, state, path, 1, 0, "", "cpu", "")
    write_fleet(node.run, FleetSnapshot(1, "m", "m", str(node.tables), (replica,)))


def door(node: Node) -> socket.socket:
    """A connection at the socket that leads to node-a's replica."""
    until(lambda: any(told.sockets for told in read_nodes(node.run).nodes), "a socket")
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(next(path for told in read_nodes(node.run).nodes for path in told.sockets.values()))
    return connection


def received(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (data := connection.recv(size - len(found))):
        found += data
    return found


def test_what_is_sent_comes_back_whole(pair: tuple[Node, Node], server: Server) -> None:
    with door(pair[1]) as connection:
        connection.sendall(b"hello")
        assert received(connection, 5) == b"hello"
        sender = threading.Thread(target=connection.sendall, args=(LARGE,))
        sender.start()
        assert received(connection, len(LARGE)) == LARGE
        sender.join()


def test_a_client_that_leaves_is_noticed_by_the_replica(pair: tuple[Node, Node], server: Server) -> None:
    with door(pair[1]) as connection:
        connection.sendall(b"hello")
        received(connection, 5)
    assert server.ended.wait(20)


def test_a_replica_that_is_gone_ends_the_connection(pair: tuple[Node, Node], server: Server) -> None:
    connection = door(pair[1])
    server.close()
    os.unlink(server.path)
    with connection:
        assert connection.recv(1) == b""


def test_what_the_node_says_of_its_replicas_follows(pair: tuple[Node, Node], server: Server) -> None:
    def states() -> list[str]:
        return [replica.state for told in read_nodes(pair[1].run).nodes if told.fleet for replica in told.fleet.replicas]

    until(lambda: states() == ["ready"])
    serves(pair[0], server.path, ReplicaState.DRAINING)
    until(lambda: states() == ["draining"])
    pair[0].stop()
    until(lambda: states() == [])
    (lost,) = read_nodes(pair[1].run).nodes
    assert (lost.name, lost.address) == ("node-a", pair[0].peer.address)
    assert lost.trouble
    assert lost.losses == 1  # however often it was called since


@pytest.mark.parametrize("name", ["../replica-0", "a\0b", "a\r\nx-peerkv-replica: b", "node-c:replica-0"])
def test_a_replica_of_an_impossible_name_is_not_led_to(pair: tuple[Node, Node], server: Server, name: str) -> None:
    serves(pair[0], server.path, name=name)
    until(lambda: any("a replica called" in told.trouble for told in read_nodes(pair[1].run).nodes), "the refusal")
    assert all(told.fleet is None and name not in told.sockets for told in read_nodes(pair[1].run).nodes)
    serves(pair[0], server.path)
    with door(pair[1]) as connection:
        connection.sendall(b"hello")
        assert received(connection, 5) == b"hello"


def test_who_has_no_key_of_ours_or_another_name_is_refused(pair: tuple[Node, Node], tmp_path: Path) -> None:
    a, b = pair
    address = ("127.0.0.1", a.port)
    strangers = make_keys(tmp_path / "others", ["node-b"])
    for context, name in ((None, "node-b"), (client_context(strangers[0]), "node-b"), (client_context(b.keys), "node-c")):
        with pytest.raises(NodeError):
            call(address, "node-a", context, Hello(name, "changes"))
    with pytest.raises(NodeError, match="speaks versions 8 to 9"):
        call(address, "node-a", client_context(b.keys), Hello("node-b", "changes", protocol_min=8, protocol_max=9))


def test_garbage_leaves_the_agent_serving(pair: tuple[Node, Node], server: Server) -> None:
    a, b = pair
    context = client_context(b.keys)
    assert context is not None
    for garbage in (b"\xff" * 50, b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\x03abc"):
        for secret in (False, True):
            plain = socket.create_connection(("127.0.0.1", a.port))
            plain.settimeout(20)
            connection: socket.socket = context.wrap_socket(plain, server_hostname="node-a") if secret else plain
            with connection:
                try:
                    connection.sendall(garbage)
                    connection.recv(100)
                except (OSError, ssl.SSLError):
                    continue
    with door(b) as connection:
        connection.sendall(b"hello")
        assert received(connection, 5) == b"hello"


def test_who_says_nothing_is_given_up(pair: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.node.streams.HELLO_SECONDS", 0.3)
    context = client_context(pair[1].keys)
    assert context is not None
    with context.wrap_socket(socket.create_connection(("127.0.0.1", pair[0].port)), server_hostname="node-a") as connection:
        connection.settimeout(20)
        began = time.monotonic()
        with suppress(ConnectionResetError, ssl.SSLError):
            assert connection.recv(1) == b""
        assert time.monotonic() - began < 10


def test_who_never_ends_its_handshake_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has shown no key, and holds a descriptor."""
    monkeypatch.setattr("engine.node.agent.HELLO_SECONDS", 0.3)
    with nodes(tmp_path, "node-a", "node-b") as (a, b):
        a.start(b.peer)
        with socket.create_connection(("127.0.0.1", a.port)) as connection:
            connection.settimeout(20)
            with suppress(ConnectionResetError):
                assert connection.recv(1) == b""


def test_a_request_while_the_fleet_is_another_releases_is_refused(
    pair: tuple[Node, Node], server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    a, b = pair
    door(b).close()
    (a.run / FLEET_FILE).write_bytes(b'{"version": "of another release"}')
    until(lambda: all(told.fleet and not told.fleet.replicas for told in read_nodes(b.run).nodes), "the end of the replicas")
    wire = call(("127.0.0.1", a.port), "node-a", client_context(b.keys), Hello("node-b", "requests", replica="replica-0"))
    with closing(wire), pytest.raises(NodeError):
        wire.read_into(memoryview(bytearray(1)))
    a.stop()
    assert "replica-0: fleet.json is not a fleet" in caplog.text
