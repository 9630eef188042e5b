"""A mirror of another node's table says what the table says, as it is told over the wire."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.transport.table_fixtures import writer
from transport.keys import chain_keys, root_key
from transport.node.changes import NOT_READABLE, Changes
from transport.node.messages import (
    FRAME_BYTES_MAX,
    LENGTH_BYTES,
    PROTOCOL_MAX,
    Beat,
    Delivered,
    EngineTold,
    Hello,
    Message,
    NodeError,
    TableChanged,
    TableClosed,
    TableOpened,
    agreed,
    body_bytes,
    decode,
    encode,
)
from transport.node.mirrors import Mirrors, slot_bytes
from transport.table.deliveries import Delivery, DeliveryReason, FromSource
from transport.table.directory import TableDirectory
from transport.table.journal import ENTRIES
from transport.table.layout import Layer, Memory, Region
from transport.table.quality import CODED, IN_CODE, LOSSY, QUALITY
from transport.table.writer import TableWriter

BLOCKS = 64
KEYS = chain_keys(root_key(b"f" * 16), range(BLOCKS * 3), 1)
MEMORY = Memory(0, "shared_memory", (Region("{}", 1 << 20),), (Layer(0, 0, 64, 40), Layer(0, 4096, 64, 30)))


class Nodes:
    """node-b with its tables, and node-a that hears of them. `now` is node-a's clock, in ns."""

    def __init__(self, path: Path) -> None:
        self.theirs, self.ours = path / "b", path / "a"
        self.now = 1_000_000
        self.there = TableDirectory(self.theirs)
        self.here = TableDirectory(self.ours)
        self.changes = Changes()
        self.mirrors = Mirrors(self.ours, "node-b", "node-a", 1, Region("{}", 1 << 20), lambda: self.now)
        self.ours.mkdir(mode=0o700)

    def tell(self) -> list[Message]:
        """A round of changes reaches node-a."""
        told = [decode(encode(message)[LENGTH_BYTES:]) for message in self.changes.round(self.there.tables())]
        for message in told:
            self.mirrors.hear(message)
        return told

    def mirror(self, name: str):
        return self.here.tables()[f"node-b:{name}"]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    made.mirrors.close()


@pytest.fixture
def owner(nodes: Nodes) -> Iterator[TableWriter]:
    made = writer(nodes.theirs, "replica-0", BLOCKS, memories=(MEMORY,))
    yield made
    made.close()


def test_a_mirror_is_a_table_of_the_same_blocks_in_the_agents_memory(nodes: Nodes, owner: TableWriter) -> None:
    owner.publish([3, 5], KEYS[:2])
    nodes.tell()
    mirror, reader = nodes.mirror("replica-0"), nodes.there.tables()["replica-0"]
    assert (mirror.epoch, mirror.block_size, mirror.num_blocks) == (reader.epoch, reader.block_size, reader.num_blocks)
    assert (mirror.fingerprint, mirror.hash_name, mirror.transport, mirror.status) == (
        reader.fingerprint,
        reader.hash_name,
        reader.transport,
        "ok",
    )
    assert mirror.longest_run(KEYS).block_ids.tolist() == [3, 5]
    assert (mirror.longest_run(KEYS).states == reader.longest_run(KEYS).states).all()
    (memory,) = mirror.memories
    assert [(layer.offset, layer.bytes, layer.stride) for layer in memory.layers] == [(0, 40, 128), (40, 30, 128)]
    assert slot_bytes(70) == 128


moves = st.lists(st.tuples(st.booleans(), st.integers(0, BLOCKS - 1), st.integers(1, 9), st.booleans()), max_size=40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(moves)
def test_after_every_round_the_mirror_holds_what_the_table_holds(
    nodes: Nodes, owner: TableWriter, steps: list[tuple[bool, int, int, bool]]
) -> None:
    owner.clear()
    for place, (offer, first, count, told) in enumerate(steps):
        blocks = list(range(first, min(BLOCKS, first + count)))
        if offer:
            owner.publish(blocks, KEYS[place : place + len(blocks)])
        else:
            owner.invalidate(blocks)
        if told:
            nodes.tell()
    nodes.tell()
    mirror, reader = nodes.mirror("replica-0"), nodes.there.tables()["replica-0"]
    assert (mirror.look_up(KEYS)[0] == reader.look_up(KEYS)[0]).all()
    (ours, our_keys), (theirs, their_keys) = mirror.content(np.arange(BLOCKS)), reader.content(np.arange(BLOCKS))
    held = theirs & np.uint64(1) == 0
    assert (ours & np.uint64(1) == theirs & np.uint64(1)).all()
    assert (ours[held] == theirs[held]).all()
    assert (our_keys[held] == their_keys[held]).all()
    assert mirror.cached_blocks() == reader.cached_blocks()
    after = mirror.journal.head[0]
    owner.invalidate([0])
    owner.publish([0], KEYS[-1:])
    nodes.tell()
    changed = mirror.journal.since(after)
    assert changed is not None
    assert changed.tolist() == [0]  # who follows the mirror follows the table


def test_blocks_that_lie_coded_are_not_told_by_a_node_that_cannot_decode_them(nodes: Nodes, owner: TableWriter) -> None:
    owner.publish([2, 3], KEYS[:2], np.array([LOSSY, LOSSY | CODED | IN_CODE], np.uint64))
    nodes.tell()
    owner.publish([4], KEYS[2:3], LOSSY | CODED | IN_CODE)
    nodes.tell()
    assert nodes.mirror(owner.path.stem).look_up(KEYS[:3])[0].tolist() == [True, False, False]
    owner.invalidate([4])
    owner.publish([4], KEYS[2:3], LOSSY)
    nodes.tell()
    assert nodes.mirror(owner.path.stem).look_up(KEYS[:3])[0].tolist() == [True, False, True]


def test_blocks_that_lie_coded_are_told_with_that_by_a_node_that_decodes_them(nodes: Nodes, owner: TableWriter) -> None:
    nodes.changes = Changes(decodes=lambda: True)
    owner.publish([2, 3], KEYS[:2], np.array([LOSSY, LOSSY | CODED | IN_CODE], np.uint64))
    nodes.tell()
    held, _, states = nodes.mirror(owner.path.stem).look_up(KEYS[:3])
    assert held.tolist() == [True, True, False]
    assert [int(state) & QUALITY for state in states[:2]] == [LOSSY, LOSSY | CODED | IN_CODE]


def test_blocks_that_lie_coded_are_told_as_long_as_they_can_be_decoded(nodes: Nodes, owner: TableWriter) -> None:
    decodes = [False]
    nodes.changes = Changes(decodes=lambda: decodes[0])
    owner.publish([2, 3], KEYS[:2], np.array([LOSSY, LOSSY | CODED | IN_CODE], np.uint64))
    nodes.tell()
    mirror = nodes.mirror(owner.path.stem)
    for now, held in ((False, [True, False]), (True, [True, True]), (False, [True, False])):
        decodes[0] = now
        nodes.tell()
        assert mirror.look_up(KEYS[:2])[0].tolist() == held
        assert mirror.cached_blocks() == sum(held)
    assert not any(isinstance(message, TableChanged) for message in nodes.tell())


def test_who_fell_behind_the_journal_is_told_all(nodes: Nodes, owner: TableWriter) -> None:
    nodes.tell()
    for _ in range(ENTRIES // BLOCKS):
        owner.publish(range(BLOCKS), KEYS[:BLOCKS])
        owner.clear()
    owner.publish([7], KEYS[:1])
    nodes.tell()
    assert nodes.mirror("replica-0").longest_run(KEYS).block_ids.tolist() == [7]
    assert nodes.mirror("replica-0").cached_blocks() == 1


def test_load_counters_and_deliveries_come_in_this_nodes_time_and_names(nodes: Nodes, owner: TableWriter) -> None:
    nodes.now = 5_000_000_000
    nodes.mirrors.hear(Beat(2_000_000_000))  # its clock is 3 s behind ours
    nodes.now += 7_000_000
    nodes.mirrors.hear(Beat(2_000_000_000))  # a beat that was late says nothing new
    owner.beat(1_500_000_000)
    owner.tell_load((1, 2, 3, 4, 5, 6))
    owner.count("requests", 9)
    owner.waiting.add(77)
    done = Delivery(tag=5, arrived_ns=1_000_000_000, first_token_ns=1_900_000_000, prompt_tokens=10, computed_tokens=10)
    owner.deliver(done, "")
    owner.deliver(msgspec.structs.replace(done, source="replica-1", why=DeliveryReason.LIMITED), "shared_memory")
    mixed = msgspec.structs.replace(done, source="node-a:replica-3", further=(FromSource("disk", 4), FromSource("node-a:b", 2)))
    owner.deliver(mixed, "shared_memory")
    nodes.tell()
    mirror = nodes.mirror("replica-0")
    assert mirror.heartbeat_ns() == 4_500_000_000
    assert (mirror.load().waiting_requests, mirror.load().pinned_blocks) == (1, 6)
    assert mirror.counters()["requests"] == 9
    assert mirror.waits(77)
    _, found = mirror.deliveries(0)
    assert [(each.arrived_ns, each.first_token_ns, each.asked_ns) for each in found] == [(4_000_000_000, 4_900_000_000, 0)] * 3
    assert [each.source for each in found] == ["", "node-b:replica-1", "replica-3"]
    assert found[1].why is DeliveryReason.LIMITED
    assert [each.further for each in found] == [(), (), (FromSource("node-b:disk", 4), FromSource("b", 2))]
    owner.waiting.begin(77)
    nodes.tell()
    assert not mirror.waits(77)


def test_a_table_that_is_opened_anew_when_its_host_memory_comes_tells_no_delivery_twice(nodes: Nodes) -> None:
    on_gpu = msgspec.structs.replace(MEMORY, transport="cuda_ipc")
    with contextlib.ExitStack() as stack:
        owner = stack.enter_context(contextlib.closing(writer(nodes.theirs, "replica-0", BLOCKS, memories=(on_gpu,))))
        done = Delivery(tag=5, prompt_tokens=10, computed_tokens=10)
        owner.deliver(done, "")
        first = nodes.tell()
        stack.enter_context(contextlib.closing(writer(nodes.theirs, "replica-0.host-memory", BLOCKS, memories=(MEMORY,))))
        owner.deliver(msgspec.structs.replace(done, tag=6), "")
        second = nodes.tell()
    opened = [each.name for each in second if isinstance(each, TableOpened)]
    assert "replica-0" in opened
    told = [[each.tag for m in messages if isinstance(m, Delivered) for each in m.deliveries] for messages in (first, second)]
    assert told == [[5], [6]]


def test_an_owner_that_ends_ends_its_mirror_and_its_last_deliveries_come_first(nodes: Nodes, owner: TableWriter) -> None:
    nodes.tell()
    nodes.there.tables()
    owner.deliver(Delivery(tag=3), "")
    mirror = nodes.mirror("replica-0")
    owner.close()
    told = nodes.tell()
    assert [type(message) for message in told] == [Delivered, TableClosed]
    assert not mirror.alive()
    assert not nodes.here.tables()


def test_a_restarted_owner_is_another_epoch(nodes: Nodes, owner: TableWriter) -> None:
    owner.publish([1], KEYS[:1])
    nodes.tell()
    before = nodes.mirror("replica-0").epoch
    owner.close()
    nodes.tell()
    again = writer(nodes.theirs, "replica-0", BLOCKS)
    nodes.tell()
    assert nodes.mirror("replica-0").epoch == again.epoch != before
    assert nodes.mirror("replica-0").cached_blocks() == 0
    again.close()


def test_mirrors_are_not_told_on(nodes: Nodes, owner: TableWriter) -> None:
    nodes.tell()
    assert nodes.here.tables().keys() == {"node-b:replica-0"}
    assert list(Changes().round(nodes.here.tables())) == []


def test_memory_on_a_gpu_is_told_as_not_exchanged(nodes: Nodes) -> None:
    memory = msgspec.structs.replace(MEMORY, transport="cuda_ipc")
    table = writer(nodes.theirs, "replica-0", BLOCKS, transport="cuda_ipc", memories=(memory,))
    nodes.tell()
    assert (nodes.mirror("replica-0").status, nodes.mirror("replica-0").memories) == (NOT_READABLE, ())
    table.close()


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": 3},
        {"ids": b"\x01\0\0"},
        {"ids": b"\xff\xff\0\0"},
        {"states": b""},
        {"keys": b"\0" * 8},
    ],
)
def test_changes_that_cannot_be_are_refused(nodes: Nodes, owner: TableWriter, change: dict[str, object]) -> None:
    nodes.tell()
    good = TableChanged("replica-0", 1, b"\x01\0\0\0", b"\x02" + b"\0" * 7, b"\0" * 16)
    with pytest.raises(NodeError):
        nodes.mirrors.hear(msgspec.structs.replace(good, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"block_size": 1 << 62},
        {"blocks": (1 << 28) + 1},
        {"blocks": 1 << 28},
        {"fingerprint": {"a": "x" * (5 << 20)}},
    ],
)
def test_a_table_that_cannot_be_or_finds_no_room_is_refused(
    nodes: Nodes, owner: TableWriter, monkeypatch: pytest.MonkeyPatch, change: dict[str, object]
) -> None:
    def full(fd: int, begin: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (opened, *_) = nodes.tell()
    if change == {"blocks": 1 << 28}:
        monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NodeError):
        nodes.mirrors.hear(msgspec.structs.replace(opened, **change))
    assert not nodes.here.tables()
    assert not [entry for entry in os.listdir(nodes.ours) if entry.startswith(".")]


@pytest.mark.parametrize(
    "told",
    [
        EngineTold("replica-0", heartbeat_ns=1 << 63),
        EngineTold("replica-0", load={"waiting_requests": -1}),
        EngineTold("replica-0", counters={"requests": -1}),
        EngineTold("replica-0", waiting=(-1,)),
        Delivered("replica-0", (Delivery(tag=-1),)),
        Delivered("replica-0", (Delivery(tag=1, prompt_tokens=-1),)),
        Delivered("replica-0", (Delivery(tag=1, source="a", further=(FromSource("b", -1),)),)),
        Delivered("replica-0", (Delivery(tag=1, source="a", further=(FromSource("b", 1),) * 3),)),
    ],
)
def test_numbers_that_cannot_be_are_refused(nodes: Nodes, owner: TableWriter, told: Message) -> None:
    nodes.tell()
    nodes.now += 1 << 63
    nodes.mirrors.hear(Beat(0))
    with pytest.raises(NodeError):
        nodes.mirrors.hear(told)


@pytest.mark.parametrize("name", ["../evil", ".hidden", "a/b", "a\0b", "a\r\nb: c", "node-c:a", "<b>", ""])
def test_a_table_cannot_be_mirrored_elsewhere(nodes: Nodes, owner: TableWriter, name: str) -> None:
    (opened, *_) = nodes.tell()
    assert isinstance(opened, TableOpened)
    with pytest.raises(NodeError):
        nodes.mirrors.hear(msgspec.structs.replace(opened, name=name))


@given(st.binary(max_size=200))
def test_garbage_is_refused_and_nothing_else_happens(garbage: bytes) -> None:
    with pytest.raises(NodeError):
        decode(b"\xc1" + garbage)
    with contextlib.suppress(NodeError):  # and no other error
        decode(garbage)
    if len(garbage) >= LENGTH_BYTES and int.from_bytes(garbage[:LENGTH_BYTES]) > FRAME_BYTES_MAX:
        with pytest.raises(NodeError):
            body_bytes(garbage[:LENGTH_BYTES])


def test_releases_agree_on_the_newest_version_that_both_speak_or_say_what_differs() -> None:
    assert agreed(Hello("node-b", "changes")) == PROTOCOL_MAX
    assert agreed(Hello("node-b", "changes", protocol_max=PROTOCOL_MAX + 3)) == PROTOCOL_MAX
    with pytest.raises(NodeError, match=r"node-b \(peerkv 9\.0\) speaks versions 8 to 9 .* this node 1 to 1"):
        agreed(Hello("node-b", "changes", protocol_min=8, protocol_max=9, release="9.0"))
    newer = encode(Hello("node-b", "changes"))[LENGTH_BYTES:]
    fields = msgspec.msgpack.decode(newer) | {"something": "that we do not know"}
    assert decode(msgspec.msgpack.encode(fields)) == Hello("node-b", "changes")


def test_ids_told_twice_are_refused(nodes: Nodes, owner: TableWriter) -> None:
    nodes.tell()
    ids = np.array([1, 1], "<u4").tobytes()
    with pytest.raises(NodeError):
        nodes.mirrors.hear(TableChanged("replica-0", 1, ids, b"\0" * 16, b"\0" * 32))
