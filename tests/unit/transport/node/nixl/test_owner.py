"""What a node offers by NIXL, and what it stands by: in front of a process that only says what it was told to."""

import threading
from collections.abc import Callable

import pytest

from tests.unit.shortages import no_threads
from tests.unit.waiting import until
from transport.node.messages import PROBE, PROBE_BLOCK_BYTES, NodeError, Placed
from transport.node.nixl import owner as module
from transport.node.nixl.ability import Ability
from transport.node.nixl.orders import Disown, Done, Own
from transport.node.nixl.owner import NixlOwner
from transport.node.nixl.process import OrderFailed
from transport.table.layout import Layer, Memory, Region

KEY = ("owner", 7, 0)
MEMORY = Memory(0, "shared_memory", (Region("a", 100), Region("b", 200)), (Layer(1, 8, 40, 30), Layer(0, 0, 20, 10, 1)))


class Process:
    name = "nixl-owner-node-a-1"

    def __init__(self) -> None:
        self.life, self.trouble = 1, ""
        self.orders: list[object] = []
        self.registered = threading.Event()
        self.registered.set()
        self.answer: Callable[[Own], Done] = lambda order: Done(order.id, addresses=(1000, 5000), metadata=b"m")

    def new_id(self) -> int:
        return len(self.orders) + 1

    def ask(self, order: Own, seconds: float) -> Done:
        self.orders.append(order)
        assert self.registered.wait(20)
        return self.answer(order)

    def tell(self, order: Disown) -> None:
        self.orders.append(order)


@pytest.fixture
def process() -> Process:
    return Process()


@pytest.fixture
def owner(process: Process) -> NixlOwner:
    return NixlOwner(process, Ability("1.5.1"), Region("probe", 16 << 20))


def test_memory_is_registered_once_and_offered_with_its_addresses(process: Process, owner: NixlOwner) -> None:
    offered = owner.offer(KEY, MEMORY)
    assert offered.layers == (Placed(5008, 40, 30, 0), Placed(1000, 20, 10, 1))
    assert (offered.agent, offered.metadata) == (process.name, b"m")
    assert owner.offer(KEY, MEMORY) == offered
    assert process.orders == [Own(1, MEMORY.regions, writable=False)]
    assert owner.holds(KEY, offered.offer)
    assert not owner.holds(KEY, offered.offer + 1)
    assert not owner.holds(("owner", 8, 0), offered.offer)


def test_where_there_are_rdma_devices_memory_is_mapped_for_writing_too(process: Process) -> None:
    NixlOwner(process, Ability("1.5.1", devices=True), Region("probe", 1)).offer(KEY, MEMORY)
    assert process.orders == [Own(1, MEMORY.regions, writable=True)]


def test_memory_for_measuring_is_registered_once_whatever_a_node_asks_for(process: Process, owner: NixlOwner) -> None:
    offered = owner.offer((PROBE, 0, 0), None)
    assert offered.layers == (Placed(1000, PROBE_BLOCK_BYTES, PROBE_BLOCK_BYTES),)
    assert all(owner.offer((PROBE, epoch, rank), None) == offered for epoch in range(5) for rank in range(5))
    assert len(process.orders) == 1
    assert owner.holds((PROBE, 3, 4), offered.offer)


def test_what_was_dropped_is_held_no_more_and_offered_anew_under_another_number(process: Process, owner: NixlOwner) -> None:
    offered = owner.offer(KEY, MEMORY)
    owner.drop([KEY, ("nobody", 1, 0)])
    assert not owner.holds(KEY, offered.offer)
    assert process.orders[-1] == Disown(1)
    again = owner.offer(KEY, MEMORY)
    assert again.offer != offered.offer
    assert owner.holds(KEY, again.offer)
    assert not owner.holds(KEY, offered.offer)


def test_of_a_process_that_ended_nothing_is_held(process: Process, owner: NixlOwner) -> None:
    offered = owner.offer(KEY, MEMORY)
    process.life += 1
    assert not owner.holds(KEY, offered.offer)
    assert owner.holds(KEY, owner.offer(KEY, MEMORY).offer)


def test_while_memory_is_being_registered_whoever_asks_is_told_so(
    process: Process, owner: NixlOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.01)
    process.registered.clear()
    for _ in range(2):
        with pytest.raises(NodeError, match="is being registered"):
            owner.offer(KEY, MEMORY)
    monkeypatch.setattr(module, "WAIT_SECONDS", 10)
    process.registered.set()
    assert owner.offer(KEY, MEMORY).layers
    assert len(process.orders) == 1


def test_memory_that_cannot_be_registered_is_not_tried_again_by_the_same_process(process: Process, owner: NixlOwner) -> None:
    def fail(order: Own) -> Done:
        raise OrderFailed("no memory may be locked")

    process.answer = fail
    for _ in range(2):
        with pytest.raises(NodeError, match="locked"):
            owner.offer(KEY, MEMORY)
    assert len(process.orders) == 1
    process.life += 1
    with pytest.raises(NodeError):
        owner.offer(KEY, MEMORY)
    assert len(process.orders) == 2


def test_memory_for_which_the_process_gave_no_answer_is_tried_again(process: Process, owner: NixlOwner) -> None:
    def fail(order: Own) -> Done:
        raise NodeError("it does not answer")

    answer, process.answer = process.answer, fail
    with pytest.raises(NodeError, match="does not answer"):
        owner.offer(KEY, MEMORY)
    process.answer = answer
    assert owner.offer(KEY, MEMORY).layers


def test_where_threads_are_short_memory_is_not_offered_and_the_next_who_asks_is(process: Process, owner: NixlOwner) -> None:
    with no_threads("peerkv-register"), pytest.raises(NodeError, match="short of threads"):
        owner.offer(KEY, MEMORY)
    assert owner.offer(KEY, MEMORY).layers


def test_memory_whose_owner_ends_while_it_is_being_registered_is_let_go_of(
    process: Process, owner: NixlOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the orders come: an Own after its Disown would keep the memory for ever."""
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.01)
    process.registered.clear()
    with pytest.raises(NodeError):
        owner.offer(KEY, MEMORY)
    owner.drop([KEY])
    assert process.orders.count(Disown(1)) == 1
    process.registered.set()
    until(lambda: process.orders.count(Disown(1)) == 2)


def test_what_a_process_cannot_do_now_is_told_in_its_words(process: Process, owner: NixlOwner) -> None:
    assert owner.ability() == Ability("1.5.1")
    process.trouble = "NIXL is being started"
    assert owner.ability() == Ability(reason="NIXL is being started")
