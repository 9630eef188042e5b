"""Blocks of a GPU for another node: a request asks its engine to store them in host memory, and tables say that it did."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest
import torch

from engine.fleet import FleetSnapshot, Replica, ReplicaState, write_fleet
from engine.node import on_demand
from engine.node.on_demand import ASKED_MAX, OnDemand
from tests.unit.engine.node.imports import NodePair
from tests.unit.engine.node.two_nodes import nodes
from tests.unit.transport.backends.test_copy import BLOCKS
from tests.unit.transport.node.devices import Device, caches
from tests.unit.transport.node.owners import KEYS
from tests.unit.waiting import until
from transport.backends.base import ImportJob
from transport.hint import STORE_MAX, read_hint
from transport.node.messages import NodeError


class Engine:
    """A server on a unix socket that takes requests as vLLM's does; `does` is told what the hint of each has stored."""

    def __init__(self, path: Path, does: Callable[[tuple[int, ...]], None], status: int = 200) -> None:
        self.path, self.status = path / "replica.sock", status
        self.bodies: list[dict] = []
        self._does = does
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def asked(self) -> list[tuple[int, ...]]:
        return [read_hint(body["kv_transfer_params"]).store for body in self.bodies]

    def snapshot(self, state: ReplicaState = ReplicaState.READY) -> FleetSnapshot:
        replica = Replica("owner", state, str(self.path), None, 0, "", "cuda:0", "")
        return FleetSnapshot(1, "/m", "served", "/t", (replica,))

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as read:
                length = 0
                assert read.readline() == b"POST /v1/completions HTTP/1.1\r\n"
                while line := read.readline().strip():
                    name, _, value = line.partition(b": ")
                    length = int(value) if name == b"content-length" else length
                body = json.loads(read.read(length))
                self.bodies.append(body)
                if self.status == 200:
                    self._does(read_hint(body["kv_transfer_params"]).store)
                with suppress(OSError):  # nobody waits for the answer
                    connection.sendall(b"HTTP/1.1 %d Said\r\n\r\n{}" % self.status)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


class Missing:
    """Blocks until they are stored."""

    def __init__(self, *blocks: int) -> None:
        self.blocks = list(blocks)

    def __call__(self) -> list[int]:
        return list(self.blocks)

    def store(self, blocks) -> None:
        stored = set(blocks)
        self.blocks = [block for block in self.blocks if block not in stored]


@pytest.fixture
def engine(tmp_path) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(*args, **about) -> Engine:
        made.append(Engine(tmp_path, *args, **about))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_an_engine_is_asked_by_a_request_for_one_token_that_says_what_to_store(engine, monkeypatch):
    monkeypatch.setattr(on_demand, "AGAIN_SECONDS", 5.0)  # its thread may be late
    missing = Missing(3, 9)
    asked = engine(missing.store)
    OnDemand(asked.snapshot).store("owner", missing)
    assert not missing()
    (body,) = asked.bodies
    assert {name: body[name] for name in ("model", "prompt", "max_tokens")} == {
        "model": "served",
        "prompt": [0],
        "max_tokens": 1,
    }
    assert read_hint(body["kv_transfer_params"]).source == ""  # it imports nothing for that
    assert asked.asked == [(3, 9)]


def test_what_is_there_already_is_asked_of_nobody(engine):
    asked = engine(lambda blocks: None)
    OnDemand(asked.snapshot).store("owner", Missing())
    assert not asked.bodies


def test_it_is_asked_again_as_it_learns_only_with_a_step_that_copies_ended(engine, monkeypatch):
    monkeypatch.setattr(on_demand, "AGAIN_SECONDS", 0.3)  # a fourth time would be too late
    missing = Missing(3, 9)
    steps: list[int] = []

    def step(blocks) -> None:
        steps.append(len(blocks))
        if len(steps) == 3:
            missing.store(blocks)

    asked = engine(step)
    OnDemand(asked.snapshot).store("owner", missing)
    assert asked.asked == [(3, 9)] * 3


def test_an_engine_that_does_not_answer_yet_is_not_waited_for(engine):
    missing, held = Missing(3, 9), threading.Event()

    def busy(blocks) -> None:
        missing.store(blocks)
        held.wait(10)

    asked = engine(busy)
    began = time.monotonic()
    OnDemand(asked.snapshot).store("owner", missing)
    assert time.monotonic() - began < 0.4
    held.set()
    assert not missing()


def test_no_more_is_asked_for_at_once_than_an_engine_stores_at_a_time(engine):
    missing = Missing(*range(STORE_MAX + 5))
    asked = engine(missing.store)
    OnDemand(asked.snapshot).store("owner", missing)
    counts = [len(blocks) for blocks in asked.asked]
    assert set(counts) == {STORE_MAX, 5}
    assert not missing()


def test_what_an_engine_does_not_store_in_time_is_not_waited_for_and_not_asked_for_again_at_once(engine, monkeypatch):
    monkeypatch.setattr(on_demand, "STORE_SECONDS_MAX", 0.3)
    now, asked = [0.0], engine(lambda blocks: None)
    demand = OnDemand(asked.snapshot, clock=lambda: time.monotonic() + now[0])
    began = time.monotonic()
    demand.store("owner", Missing(3))
    assert 0.25 < time.monotonic() - began < 5
    before = len(asked.bodies)
    assert 2 <= before <= 5
    demand.store("owner", Missing(3))
    assert len(asked.bodies) == before
    now[0] = on_demand.REFUSED_SECONDS + 1
    missing = Missing(3)
    asked._does = missing.store
    demand.store("owner", missing)
    assert not missing()


def test_an_engine_that_answers_an_error_is_given_up_at_once(engine):
    asked = engine(lambda blocks: None, status=404)
    demand = OnDemand(asked.snapshot)
    with pytest.raises(NodeError, match="owner answered 404"):
        demand.store("owner", Missing(3))
    demand.store("owner", Missing(3))
    assert len(asked.bodies) == 1


@contextmanager
def taking_nobody(path: Path) -> Iterator[FleetSnapshot]:
    """A replica whose socket has a full queue, as one that is stopped may have."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
        listener.bind(str(path / "replica.sock"))
        listener.listen(0)
        with ExitStack() as queued:
            while True:
                waiting = queued.enter_context(closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
                waiting.setblocking(False)
                try:
                    waiting.connect(str(path / "replica.sock"))
                except BlockingIOError:
                    break
            replica = Replica("owner", ReplicaState.READY, str(path / "replica.sock"), None, 0, "", "cuda:0", "")
            yield FleetSnapshot(1, "/m", "served", "/t", (replica,))


def test_a_replica_that_takes_no_connection_is_left_alone_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(on_demand, "SEND_SECONDS_MAX", 0.2)
    with taking_nobody(tmp_path) as fleet:
        later, looked = [0.0], []
        demand = OnDemand(lambda: looked.append(1) or fleet, clock=lambda: time.monotonic() + later[0])
        with pytest.raises(NodeError, match="owner: "):
            demand.store("owner", Missing(3))
        demand.store("owner", Missing(3))
        assert len(looked) == 1
        later[0] = on_demand.REFUSED_SECONDS + 1
        with pytest.raises(NodeError, match="owner: "):
            demand.store("owner", Missing(3))


def test_who_asked_waits_no_longer_for_one_that_does_not_read_what_it_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(on_demand, "STORE_SECONDS_MAX", 0.1)
    monkeypatch.setattr(on_demand, "SEND_SECONDS_MAX", 60.0)
    monkeypatch.setattr(on_demand, "_request", lambda model, blocks: bytes(64 << 20))  # more than a socket takes unread
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
        listener.bind(str(tmp_path / "replica.sock"))
        listener.listen()
        replica = Replica("owner", ReplicaState.READY, str(tmp_path / "replica.sock"), None, 0, "", "cuda:0", "")
        demand = OnDemand(lambda: FleetSnapshot(1, "/m", "served", "/t", (replica,)))
        began = time.monotonic()
        with pytest.raises(NodeError, match="owner: timed out"):
            demand.store("owner", Missing(3))
        assert time.monotonic() - began < 30


@pytest.mark.parametrize("state", [ReplicaState.STARTING, ReplicaState.STOPPED, ReplicaState.BACKOFF])
def test_a_replica_that_takes_no_requests_is_not_asked(engine, state):
    asked = engine(lambda blocks: None)
    with pytest.raises(NodeError, match="takes no requests"):
        OnDemand(lambda: asked.snapshot(state)).store("owner", Missing(3))
    assert not asked.bodies


def test_only_so_many_fetches_wait_for_one_engine(engine, monkeypatch):
    monkeypatch.setattr(on_demand, "STORE_SECONDS_MAX", 20.0)
    missing, asked = Missing(3), engine(lambda blocks: None)
    demand = OnDemand(asked.snapshot)
    waiting = [threading.Thread(target=demand.store, args=("owner", missing)) for _ in range(ASKED_MAX)]
    for thread in waiting:
        thread.start()
    until(lambda: demand._asked.get("owner") == ASKED_MAX)
    began = time.monotonic()
    demand.store("owner", missing)  # one more gets what is there
    assert time.monotonic() - began < 5
    missing.store([3])
    for thread in waiting:
        thread.join(10)
        assert not thread.is_alive()


def test_a_replica_on_another_node_imports_what_a_gpu_has(tmp_path):
    """Two agents; the GPU is a tensor that no process but its engine's has, and its engine stores what it is asked for."""
    with nodes(tmp_path, "node-a", "node-b") as (a, b):
        device = Device(a.tables)
        with closing(device), closing(Engine(tmp_path, device.store)) as engine:
            write_fleet(a.run, engine.snapshot())
            a.start(b.peer)
            b.start(a.peer)
            pair = NodePair(a, b)
            with closing(pair):
                pair.worker(lambda: caches(BLOCKS))
                until(lambda: "node-a:owner" in pair.here.tables(), "the mirror")
                until(lambda: len(pair.here.tables()["node-a:owner"].longest_run(KEYS[:9])) == 9, "its blocks")
                mirror = pair.here.tables()["node-a:owner"]
                assert mirror.status == "ok"
                run = mirror.longest_run(KEYS[:9])
                targets = torch.arange(5, 14, dtype=torch.int32).numpy()
                job = ImportJob("r", mirror.name, mirror.epoch, run.block_ids, run.states, targets, ())
                report, errors, _ = pair.imported(job)
                assert (report.reason, errors) == ("", set())
                for name, tensor in pair.caches.items():
                    assert torch.equal(tensor[5:14], device.device[name][:9])
                assert sorted(device.stored) == list(range(9))
