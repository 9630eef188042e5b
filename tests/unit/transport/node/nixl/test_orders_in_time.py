"""Which process an order goes to, where one process follows another, and what becomes of one that carries out none."""

import os
import sys
import threading
from contextlib import closing

import numpy as np
import pytest

from tests.unit.shortages import no_threads
from tests.unit.transport.node.owners import loose
from tests.unit.waiting import until
from transport.node.messages import BlocksAsked, MemoryOffered, NodeError, Placed
from transport.node.nixl import process as module
from transport.node.nixl.ability import Ability
from transport.node.nixl.client import NixlClient, agent_of
from transport.node.nixl.orders import Know
from transport.node.nixl.process import NixlProcess, OrderFailed
from transport.table.layout import Region


class Channel:
    def __init__(self) -> None:
        self.sent: list[object] = []

    def send(self, order: object) -> None:
        self.sent.append(order)


def test_a_read_that_waits_while_its_process_is_replaced_goes_to_no_other() -> None:
    """What it writes nobody would know of: its memory counts as free since the former process ended."""
    process, former, new = NixlProcess("reader", Ability("1.5.1"), {}, None), Channel(), Channel()
    process.life, process._channel = 1, former
    failures: list[NodeError] = []

    def read() -> None:
        try:
            process.read("owner", b"", 1)
        except NodeError as error:
            failures.append(error)

    with process._sending:
        reading = threading.Thread(target=read)
        reading.start()
        until(lambda: bool(process._reads))
        process.life, process._channel = 2, new
    reading.join()
    assert not new.sent
    assert not former.sent
    assert len(failures) == 1


OBEDIENT = """
import socket, sys
from transport.node.nixl.orders import Channel, Done, Ready
channel = Channel(socket.socket(fileno=int(sys.argv[1])))
channel.send(Ready())
while (orders := channel.receive(None)) is not None:
    for order in orders:
        channel.send(Done(order.id))
"""


def test_where_threads_are_short_the_process_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(module, "PAUSE_SECONDS_MAX", 0.05)
    process = NixlProcess("reader", Ability("1.5.1"), os.environ, Region("memory", 1))
    process.command = [sys.executable, "-c", OBEDIENT]
    with closing(process):
        with no_threads("peerkv-nixl-target"):
            process.start()
            until(lambda: "short of threads" in process.trouble, "the reason")
        until(lambda: not process.trouble, "another process")


class Asked:
    """Another node, which offers memory."""

    node = "node-a"

    def ask(self, message: object) -> MemoryOffered:
        return MemoryOffered(1, agent_of(self.node) + "x", (Placed(0, 8, 8),))


class Stuck:
    life = 1

    def __init__(self, trouble: str, failure: NodeError) -> None:
        self.trouble, self.failure = trouble, failure
        self.ends = 0

    def new_id(self) -> int:
        return 1

    def ask(self, order: object) -> None:
        raise self.failure

    def end(self, why: str) -> None:
        self.ends += 1


@pytest.mark.parametrize(
    ("trouble", "failure", "ends"),
    [
        ("", NodeError("it does not answer"), 1),
        ("", OrderFailed("metadata of another process"), 1),
        ("NIXL is being started", NodeError("it does not answer"), 0),  # its memory is being registered
    ],
)
def test_a_process_that_answers_no_order_is_ended_so_that_another_is_started(trouble, failure, ends) -> None:
    process = Stuck(trouble, failure)
    client = NixlClient(Asked(), process)
    with pytest.raises(NodeError):
        client.fetch(BlocksAsked("owner", 1, 0, b"\0" * 4, b"\0" * 8), [8], loose(np.zeros((1, 8), np.uint8)))
    assert process.ends == ends


class Counted(Asked):
    """Answers when it may; notes what it was asked, and is told as its process, too."""

    life, trouble = 1, ""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.orders: list[object] = []
        self.may_answer = threading.Event()

    def ask(self, message: object, seconds: float = 0.0) -> MemoryOffered:
        if isinstance(message, Know):
            self.orders.append(message)
        else:
            self.asked.append(message)
            assert self.may_answer.wait(20)
        return super().ask(message)

    def new_id(self) -> int:
        return 1

    def tell(self, order: object) -> None:
        pass

    def read(self, agent: str, spans: bytes, life: int) -> None:
        raise NodeError("as a test has it")


def test_where_memory_lies_is_asked_once_for_all_parts_of_a_fetch() -> None:
    node = Counted()
    client = NixlClient(node, node)
    failures: list[str] = []

    def fetch() -> None:
        try:
            client.fetch(BlocksAsked("owner", 1, 0, b"\0" * 4, b"\0" * 8), [8], loose(np.zeros((1, 8), np.uint8)))
        except NodeError as error:
            failures.append(str(error))

    parts = [threading.Thread(target=fetch) for _ in range(4)]
    for part in parts:
        part.start()
        part.join(0.1)  # each would have asked by then
    assert len(node.asked) == 1
    node.may_answer.set()
    for part in parts:
        part.join(20)
    assert (len(node.asked), len(node.orders), failures) == (1, 1, ["as a test has it"] * 4)
