"""Blocks by TCP, beyond what every way has to do (`test_fetching.py`): whatever the wire, its ends or strangers do."""

import contextlib
import errno
import itertools
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from tests.unit.shortages import no_threads
from tests.unit.transport.node.owners import Owner, loose
from tests.unit.waiting import until
from transport.node import block_client, block_server, sockets
from transport.node.block_client import BlockClient
from transport.node.block_server import BlockServer
from transport.node.keys import client_context, make_keys, server_context
from transport.node.messages import BlocksAsked, BlocksSent, Hello, MemoryAsked, MemoryOffered, NodeError, OwnerKey, encode
from transport.node.nixl.ability import NO_NIXL, Ability


@pytest.fixture(params=["plain", "keys"])
def contexts(request, tmp_path):
    if request.param == "plain":
        return None, None
    made = make_keys(tmp_path / "keys", ["node-a", "node-b"])
    return server_context(made[0]), client_context(made[1])


@pytest.fixture
def owner(tmp_path, contexts) -> Iterator[Owner]:
    made = Owner(tmp_path / "tables", contexts[0])
    yield made
    made.close()


@pytest.fixture
def client(owner, contexts) -> Iterator[BlockClient]:
    made = BlockClient("node-a", ("127.0.0.1", owner.server.port), contexts[1], "node-b", "test")
    yield made
    made.close()


class Offered:
    """Offers in which an owner ends as its memory is offered."""

    def __init__(self) -> None:
        self.keys: set[OwnerKey] = set()
        self.meanwhile = lambda: None

    def ability(self) -> Ability:
        return NO_NIXL

    def offer(self, key: OwnerKey, memory: object) -> MemoryOffered:
        self.meanwhile()
        self.keys.add(key)
        return MemoryOffered(reason="as a test has it")

    def holds(self, key: OwnerKey, offer: int) -> bool:
        return key in self.keys

    def drop(self, keys) -> None:
        self.keys.difference_update(keys)


def test_memory_that_is_offered_as_its_owner_ends_is_let_go_of(tmp_path):
    offers = Offered()
    owner = Owner(tmp_path / "tables", None, offers)
    client = BlockClient("node-a", ("127.0.0.1", owner.server.port), None, "node-b", "test")
    asked = MemoryAsked("owner", owner.reader.epoch, 0)
    client.ask(asked)
    assert offers.keys == {("owner", owner.reader.epoch, 0)}

    def end() -> None:
        owner.table.close()
        until(lambda: owner.server.sweep() or not owner.server._memories)

    offers.meanwhile = end
    client.ask(asked)
    assert not offers.keys
    client.close()
    owner.close()


def rows(owner: Owner, count: int):
    return np.full((count, owner.bytes + 5), 0xEE, np.uint8)


def test_a_node_that_falls_silent_is_given_up_in_time(monkeypatch, contexts):
    """Behind TLS, too, which reads again whenever the kernel's time-out has passed; and it is not called again at once."""
    monkeypatch.setattr(sockets, "PROGRESS_SECONDS", 0.3)
    listener, ended = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def answer_once() -> None:
        connection, _ = listener.accept()
        with connection if contexts[0] is None else contexts[0].wrap_socket(connection, server_side=True) as spoken:
            wire, _ = sockets.welcome(spoken, "node-a", "test")
            wire.receive()
            wire.send(encode(BlocksSent(b"\1", 1000)), bytes(1000), encode(BlocksSent(b"", 0, last=True)))
            ended.wait(20)

    thread = threading.Thread(target=answer_once)
    thread.start()
    client = BlockClient("node-a", listener.getsockname(), contexts[1], "node-b", "test")
    asked, target = BlocksAsked("owner", 1, 0, b"\0" * 4, b"\0" * 8), loose(np.zeros((1, 1000), np.uint8))
    assert client.fetch(asked, [1000], target).good.all()
    begun = time.monotonic()
    with pytest.raises(NodeError):
        client.fetch(asked, [1000], target)
    assert time.monotonic() - begun < 10
    listener.settimeout(0)
    with pytest.raises(BlockingIOError):  # nobody else waits to be accepted
        listener.accept()
    ended.set()
    thread.join(20)
    listener.close()


def test_a_node_that_falls_silent_within_a_block_is_given_up_in_time(monkeypatch, contexts):
    monkeypatch.setattr(sockets, "PROGRESS_SECONDS", 0.3)
    listener, ended = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def fall_silent() -> None:
        connection, _ = listener.accept()
        with connection if contexts[0] is None else contexts[0].wrap_socket(connection, server_side=True) as spoken:
            wire, _ = sockets.welcome(spoken, "node-a", "test")
            wire.receive()
            wire.send(encode(BlocksSent(b"\1", 1000)), b"x" * 10)
            ended.wait(20)

    thread = threading.Thread(target=fall_silent)
    thread.start()
    client = BlockClient("node-a", listener.getsockname(), contexts[1], "node-b", "test")
    begun = time.monotonic()
    with closing(listener), pytest.raises(NodeError):
        client.fetch(BlocksAsked("owner", 1, 0, b"\0" * 4, b"\0" * 8), [1000], loose(np.zeros((1, 1000), np.uint8)))
    assert time.monotonic() - begun < 10
    ended.set()
    thread.join(20)


def test_a_caller_that_asks_for_nothing_more_is_let_go(monkeypatch, owner, client):
    monkeypatch.setattr(block_server, "IDLE_SECONDS_MAX", 0.2)
    client.greet()
    until(lambda: not owner.server._open, "the end of the connection")
    assert client.fetch(owner.asked([1]), [owner.bytes], loose(rows(owner, 1))).good.all()


def test_a_node_that_sends_a_byte_now_and_then_is_given_up_too(monkeypatch):
    monkeypatch.setattr(block_client, "FETCH_SECONDS_MAX", 0.5)
    listener = socket.create_server(("127.0.0.1", 0))

    def dribble() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError, NodeError):  # whoever asked gives up
            wire, _ = sockets.welcome(connection, "node-a", "test")
            wire.receive()
            wire.send(encode(BlocksSent(b"\1", 1000)))
            while True:
                wire.send(b"x")
                time.sleep(0.02)

    threading.Thread(target=dribble, daemon=True).start()
    client = BlockClient("node-a", listener.getsockname(), None, "node-b", "test")
    begun = time.monotonic()
    target = np.zeros((1, 1000), np.uint8)
    with closing(listener), pytest.raises(NodeError):
        client.fetch(BlocksAsked("owner", 1, 0, b"\0" * 4, b"\0" * 8), [1000], loose(target))
    assert time.monotonic() - begun < 8
    assert not target.any()


@pytest.mark.parametrize("size", [999, 1001, 8, 0])
def test_a_block_of_another_size_than_it_has_is_not_taken(size):
    """A row that is filled in part would be a good block of some bytes that were there before."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(NodeError):  # whoever asked gives up
            wire, _ = sockets.welcome(connection, "node-a", "test")
            wire.receive()
            wire.send(encode(BlocksSent(b"\1", size)), b"x" * size, encode(BlocksSent(b"", 0, last=True)))
            connection.recv(1)

    thread = threading.Thread(target=answer)
    thread.start()
    client = BlockClient("node-a", listener.getsockname(), None, "node-b", "test")
    target = np.zeros((1, 1024), np.uint8)
    with closing(listener), pytest.raises(NodeError, match="nobody asked for"):
        client.fetch(BlocksAsked("owner", 1, 0, b"\0" * 4, b"\0" * 8), [1000], loose(target))
    thread.join(10)
    assert not target.any()


def test_closing_the_client_ends_a_fetch_that_is_under_way():
    silent = socket.create_server(("127.0.0.1", 0))
    client = BlockClient("node-a", silent.getsockname(), None, "node-b", "test")
    ended = []

    def fetch() -> None:
        try:
            client.fetch(BlocksAsked("owner", 1, 0, b"\0" * 4, b"\0" * 8), [8], loose(np.zeros((1, 8), np.uint8)))
        except NodeError:
            ended.append(time.monotonic())

    thread = threading.Thread(target=fetch)
    thread.start()
    connection, _ = silent.accept()
    connection.recv(1000)
    client.close()
    connection.close()
    thread.join(5)
    assert ended
    silent.close()


@pytest.mark.parametrize("ends", ["here", "there"])
def test_a_connection_that_another_thread_ends_is_never_used_without_its_tls(tmp_path, ends):
    """What had come is read as it was sent, or not at all: the ciphertext below it would be taken for blocks."""
    made = make_keys(tmp_path / "keys", ["node-a", "node-b"])
    sent = os.urandom(200_000)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        calling = socket.create_connection(listener.getsockname())
        called, _ = listener.accept()
    handshake = threading.Thread(target=lambda: servers.append(server_context(made[0]).wrap_socket(called, server_side=True)))
    servers: list[socket.socket] = []
    handshake.start()
    secret = client_context(made[1]).wrap_socket(calling, server_hostname="node-a")
    handshake.join()
    wire = sockets.Wire(secret)
    with servers[0] as server, closing(wire):
        server.sendall(sent)
        until_readable(secret)
        target = bytearray(len(sent))
        wire.read_into(memoryview(target)[:1000])
        if ends == "here":
            wire.break_off()
            with pytest.raises(NodeError):
                wire.send(b"in the clear")
        else:
            sockets.break_off(server)
            with pytest.raises((ConnectionError, ssl.SSLError)):
                server.sendall(b"in the clear")
        came = 1000
        with contextlib.suppress(NodeError):
            while came < len(sent):
                wire.read_into(memoryview(target)[came : came + 1000])
                came += 1000
        assert bytes(target[:came]) == sent[:came]


def until_readable(connection: socket.socket) -> None:
    poll = select.poll()  # which takes any descriptor: a test process may hold more than select's 1,024
    poll.register(connection, select.POLLIN)
    assert poll.poll(10_000)


def test_garbage_ends_a_connection_and_leaves_the_server_serving(owner, client, contexts):
    for garbage in (b"\xff" * 64, b"\0\0\0\x05abcde", b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096)):
        with socket.create_connection(("127.0.0.1", owner.server.port)) as connection:
            connection.settimeout(10)
            with contextlib.suppress(OSError):  # it may have hung up already
                connection.sendall(garbage)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
    assert client.fetch(owner.asked([1]), [owner.bytes] * 1, loose(rows(owner, 1))).good.all()


class Short(socket.socket):
    """A listener while descriptors are short: the first calls of accept fail, as the kernel has it."""

    refusals = 3

    def accept(self):
        self.refused = [*getattr(self, "refused", ()), time.monotonic()]
        if len(self.refused) <= self.refusals:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_where_descriptors_are_short_accepting_is_tried_again_after_a_while(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(block_server, "SHORT_SECONDS", 0.1)
    server = BlockServer(tmp_path, "node-a", ("127.0.0.1", 0), None, "test")
    port = server.port
    short = server._listener = Short(fileno=server._listener.detach())
    server.start()
    sockets.call(("127.0.0.1", port), "node-a", None, Hello("node-b", "blocks")).close()
    server.close()
    tries = short.refused[: Short.refusals + 1]
    assert len(tries) == Short.refusals + 1
    assert all(later - before >= 0.1 for before, later in itertools.pairwise(tries))
    assert caplog.text.count("Too many open files") == Short.refusals


def test_where_threads_are_short_who_called_is_hung_up_on_and_the_next_is_served(tmp_path, monkeypatch):
    monkeypatch.setattr(block_server, "SHORT_SECONDS", 0.01)
    with closing(Owner(tmp_path)) as owner:
        address = ("127.0.0.1", owner.server.port)
        with no_threads("peerkv-blocks"), socket.create_connection(address, 20) as connection:
            assert connection.recv(1) == b""
        with closing(BlockClient("node-a", address, None, "node-b", "test")) as client:
            assert client.fetch(owner.asked([3]), [owner.bytes], loose(rows(owner, 1))).good.all()


def test_a_wrong_key_and_a_missing_one_are_refused(tmp_path):
    made = make_keys(tmp_path / "ours", ["node-a", "node-b"])
    others = make_keys(tmp_path / "theirs", ["node-b"])
    owner = Owner(tmp_path / "tables", server_context(made[0]))
    address = ("127.0.0.1", owner.server.port)
    target = rows(owner, 1)
    for context, here in ((client_context(others[0]), "node-b"), (None, "node-b"), (client_context(made[1]), "node-c")):
        client = BlockClient("node-a", address, context, here, "test")
        with pytest.raises(NodeError):
            client.fetch(owner.asked([1]), [owner.bytes] * 1, loose(target))
    impostor = BlockClient("node-b", address, client_context(made[1]), "node-b", "test")
    with pytest.raises(NodeError, match="mismatch"):
        impostor.fetch(owner.asked([1]), [owner.bytes] * 1, loose(target))  # whoever answers there is not node-b
    assert (target == 0xEE).all()
    owner.close()


def test_what_is_not_good_is_left_as_it_is(owner, client):
    asked = owner.asked([3, 9, 4])
    owner.table.invalidate([9])
    target = rows(owner, 3)
    assert client.fetch(asked, [owner.bytes] * 3, loose(target)).good.tolist() == [True, False, True]
    assert (target[1] == 0xEE).all()


def test_connections_are_used_again(owner, client):
    for _ in range(3):
        assert client.fetch(owner.asked([1]), [owner.bytes], loose(rows(owner, 1))).good.all()
    assert len(client._idle) == 1
