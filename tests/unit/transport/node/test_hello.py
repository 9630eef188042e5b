"""How a connection between nodes begins: the same rules for blocks and for all else."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest

from engine.node import streams
from engine.node.settings import Peer
from transport.node import sockets
from transport.node.hello import answer_to, check_reached, check_welcome
from transport.node.messages import PROTOCOL_MAX, Beat, Hello, NodeError, Refused, Welcome, decode
from transport.node.nixl.ability import Ability

ELSEWHERE = "192.0.2.7"
"""An address for documentation: no host has it."""


def test_without_keys_only_this_machine_is_called() -> None:
    for here in ("127.0.0.1", "127.3.2.1", "::1"):
        check_reached(here, None)
    for there in (ELSEWHERE, "10.0.0.1", "fe80::1%eth0", "2001:db8::1"):
        with pytest.raises(NodeError, match="without keys"):
            check_reached(there, None)
        check_reached(there, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with closing(socket.create_server(("127.0.0.1", 0))) as made:
        yield made


def heard(listener: socket.socket, into: list[bytes]) -> threading.Thread:
    """Note all that the next caller says."""

    def hear() -> None:
        connection, _ = listener.accept()
        with connection:
            while data := connection.recv(1 << 16):
                into.append(data)

    thread = threading.Thread(target=hear)
    thread.start()
    return thread


async def test_another_host_that_answers_is_told_nothing_without_keys(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(address: str, context: ssl.SSLContext | None) -> None:
        assert address == "127.0.0.1"
        check_reached(ELSEWHERE, context)

    host, port = listening.getsockname()
    for module in (sockets, streams):
        monkeypatch.setattr(module, "check_reached", elsewhere)
    said: list[bytes] = []
    thread = heard(listening, said)
    with pytest.raises(NodeError, match="without keys"):
        sockets.call((host, port), "node-a", None, Hello("node-b", "blocks"))
    thread.join(10)
    thread = heard(listening, said)
    with pytest.raises(NodeError, match="without keys"):
        await streams.call(Peer("node-a", host, port), None, Hello("node-b", "changes"))
    thread.join(10)
    assert said == []


def test_a_hello_is_answered_and_nothing_else_is() -> None:
    hello = Hello("node-b", "changes")
    welcome = Welcome("node-a", PROTOCOL_MAX, "1.0", without_nixl="NIXL is not in use")
    assert answer_to(hello, None, "node-a", "1.0") == (hello, welcome)
    _, refused = answer_to(Hello("node-b", "changes", protocol_min=8, protocol_max=9), None, "node-a", "1.0")
    assert isinstance(refused, Refused)
    with pytest.raises(NodeError, match="hello"):
        answer_to(Beat(1), None, "node-a", "1.0")


@pytest.mark.parametrize(
    ("theirs", "nixl", "why"),
    [
        ("1.5.1", "1.5.1", ""),
        ("1.6.0", "", "NIXL is 1.5.1 here, 1.6.0 there"),
        ("", "", "NIXL is 1.5.1 here, there is none there"),
    ],
)
def test_a_welcome_says_whether_both_have_the_same_nixl(theirs: str, nixl: str, why: str) -> None:
    _, welcome = answer_to(Hello("node-b", "blocks", nixl=theirs), None, "node-a", "1.0", Ability("1.5.1"))
    assert isinstance(welcome, Welcome)
    assert (welcome.nixl, welcome.without_nixl) == (nixl, why)


def test_a_release_that_knows_nothing_of_nixl_is_understood() -> None:
    body = msgspec.msgpack.encode({"type": "welcome", "node": "node-a", "protocol": 1, "release": "0"})
    welcome = decode(body)
    assert isinstance(welcome, Welcome)
    assert (welcome.nixl, welcome.without_nixl) == ("", "its release knows nothing of NIXL")


def test_only_the_node_that_was_meant_welcomes_us() -> None:
    check_welcome(Welcome("node-a", 1), "node-a")
    for answer, words in ((Welcome("node-c", 1), "not node-a"), (Refused("too old"), "too old"), (Beat(1), "not node-a")):
        with pytest.raises(NodeError, match=words):
            check_welcome(answer, "node-a")
