"""Which way blocks come from another node, and what becomes of a fetch whose way fails."""

import numpy as np
import pytest

from engine.node.ways import Ways
from transport.node.block_fetcher import Fetched, NotOffered, StillWritten
from transport.node.messages import PROBE, PROBE_BLOCK_BYTES, BlocksAsked, NodeError, Welcome
from transport.node.nixl.ability import Ability
from transport.node.staging import Staging

HERE, WITHOUT = Ability("1.5.1"), Ability(reason="NIXL is not installed")
WELCOME = Welcome("node-b", 1, nixl="1.5.1", without_nixl="")
ASKED = BlocksAsked("owner", 1, 0, b"\0" * 4, b"\0" * 8)


class Way:
    """A way that fetches in a time of its own, or fails; it has a clock with the others."""

    def __init__(self, name: str, now: list[float], seconds: float) -> None:
        self.name, self.now, self.seconds = name, now, seconds
        self.failure: NodeError | None = None
        self.welcome = WELCOME
        self.fetched: list[str] = []
        self.closed = False

    def greet(self) -> Welcome:
        return self.welcome

    def fetch(self, asked, sizes, target) -> Fetched:
        if self.failure is not None:
            raise self.failure
        self.now[0] += self.seconds * len(sizes)
        self.fetched.append(asked.name)
        return Fetched(np.ones(len(sizes), np.bool_))

    def close(self) -> None:
        self.closed = True


class Scene:
    def __init__(self, choice="auto", nixl_seconds=0.001, here=HERE, tcp_seconds=0.01, known=0.0) -> None:
        self.now = [0.0]
        self.tcp, self.nixl = Way("tcp", self.now, tcp_seconds), Way("nixl", self.now, nixl_seconds)
        self.changes = 0
        self.staging = Staging(4 * PROBE_BLOCK_BYTES)
        self.piece = self.staging.take(4, PROBE_BLOCK_BYTES)
        self.ways = Ways("node-b", self.tcp, self.nixl if here.version else None, here, choice, self.changed, known)

    def changed(self) -> None:
        self.changes += 1

    def choose(self) -> tuple[str, str]:
        self.ways.choose(self.piece)
        return self.ways.told.transport, self.ways.told.reason

    def fetch(self) -> str:
        """Fetch a block; return the way by which it came."""
        for way in (self.tcp, self.nixl):
            way.fetched.clear()
        self.ways.fetch(ASKED, [8], self.piece)
        return next(way.name for way in (self.tcp, self.nixl) if way.fetched)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever measures reads the clock of the scene that was made last."""
    scenes: list[Scene] = []
    begin = Scene.__init__

    def begun(scene: Scene, *args, **given) -> None:
        begin(scene, *args, **given)
        scenes.append(scene)

    monkeypatch.setattr(Scene, "__init__", begun)
    monkeypatch.setattr("engine.node.ways.time.monotonic", lambda: scenes[-1].now[0])


def test_the_way_that_was_measured_to_be_sooner_is_gone() -> None:
    scene = Scene()
    assert scene.fetch() == "tcp"  # until it is known
    assert scene.choose() == ("nixl", "it is sooner")
    assert scene.ways.told.tcp_bytes_per_second == pytest.approx(PROBE_BLOCK_BYTES / 0.01)
    assert scene.ways.told.nixl_bytes_per_second == pytest.approx(PROBE_BLOCK_BYTES / 0.001)
    assert set(scene.nixl.fetched) == {PROBE}
    assert (scene.fetch(), scene.ways.settled, scene.changes) == ("nixl", True, 1)


def test_a_slower_nixl_is_left_alone_unless_it_is_wanted() -> None:
    assert Scene(nixl_seconds=0.1).choose() == ("tcp", "it is sooner")
    wanted = Scene("nixl", nixl_seconds=0.1)
    assert wanted.choose() == ("nixl", "node_transport is nixl")
    assert wanted.fetch() == "nixl"


def test_without_nixl_here_tcp_is_measured_once_and_the_reason_is_told() -> None:
    scene = Scene(here=WITHOUT)
    assert not scene.ways.settled
    scene.tcp.failure = NodeError("the link is down")
    assert scene.choose() == ("tcp", "here: NIXL is not installed")
    assert not scene.ways.settled
    scene.tcp.failure = None
    assert scene.choose() == ("tcp", "here: NIXL is not installed")
    assert (scene.ways.settled, scene.changes) == (True, 1)
    assert scene.ways.told.bytes_per_second == pytest.approx(PROBE_BLOCK_BYTES / 0.01)
    assert scene.fetch() == "tcp"


def test_what_was_measured_in_a_bad_moment_is_put_right_by_the_next_time() -> None:
    scene = Scene(here=WITHOUT, tcp_seconds=1.0)
    scene.choose()
    scene.tcp.seconds = 0.01
    scene.choose()
    assert scene.ways.told.bytes_per_second == pytest.approx(PROBE_BLOCK_BYTES / 0.01)
    assert scene.ways.settled


def test_a_nixl_that_fails_when_it_is_measured_again_is_waited_for() -> None:
    scene = Scene()
    scene.choose()
    scene.nixl.failure = NodeError("gone")
    assert scene.choose() == ("tcp", "gone")
    assert not scene.ways.settled


def test_a_node_that_is_heard_again_is_not_measured_again_by_tcp() -> None:
    scene = Scene(here=WITHOUT, known=3e9)
    assert (scene.ways.settled, scene.ways.told.bytes_per_second) == (True, 3e9)
    assert not Scene(known=3e9).ways.settled


@pytest.mark.parametrize(("seconds", "blocks"), [(2.0, 1), (0.3, 2), (0.1, 5), (0.01, 13), (1e-6, 13)])
def test_the_slower_a_way_the_less_is_measured(seconds: float, blocks: int) -> None:
    """A megabyte at least, so many slots three times at most, and what half a second takes in between."""
    scene = Scene(here=WITHOUT, tcp_seconds=seconds)
    scene.choose()
    assert round(scene.now[0] / seconds) == blocks
    assert scene.now[0] < max(1.0, 1.5 * seconds)
    assert scene.ways.told.tcp_bytes_per_second == pytest.approx(PROBE_BLOCK_BYTES / seconds)


def test_without_nixl_there_the_reason_is_told_and_it_is_asked_again() -> None:
    scene = Scene()
    scene.tcp.welcome = Welcome("node-b", 1, without_nixl="no RDMA device is active")
    assert scene.choose() == ("tcp", "node-b: no RDMA device is active")
    assert not scene.ways.settled
    assert not scene.nixl.fetched
    assert scene.ways.told.bytes_per_second == pytest.approx(PROBE_BLOCK_BYTES / 0.01)
    measured = len(scene.tcp.fetched)
    scene.choose()
    assert len(scene.tcp.fetched) == measured  # once: it is NIXL that is waited for
    scene.tcp.welcome = WELCOME
    assert scene.choose()[0] == "nixl"


def test_a_nixl_that_fails_while_it_is_measured_is_not_used() -> None:
    scene = Scene("nixl")
    scene.nixl.failure = NodeError("a read by NIXL did not end in 3 s")
    assert scene.choose() == ("tcp", "a read by NIXL did not end in 3 s")
    assert (scene.fetch(), scene.ways.settled) == ("tcp", False)


def test_a_fetch_that_fails_by_nixl_goes_by_tcp_at_once_and_so_do_the_next() -> None:
    scene = Scene()
    scene.choose()
    scene.nixl.failure = NodeError("gone")
    assert scene.fetch() == "tcp"
    assert (scene.ways.told.transport, scene.ways.told.reason) == ("tcp", "NIXL failed: gone")
    assert scene.ways.told.bytes_per_second == pytest.approx(PROBE_BLOCK_BYTES / 0.01)  # TCP's, as it was measured
    assert (scene.ways.settled, scene.changes) == (False, 2)
    scene.nixl.failure = None
    assert scene.fetch() == "tcp"
    assert scene.choose()[0] == "nixl"
    assert scene.fetch() == "nixl"


def test_memory_that_something_may_write_yet_is_not_fetched_into_by_tcp() -> None:
    scene = Scene()
    scene.choose()
    scene.nixl.failure = StillWritten("late")
    scene.tcp.fetched.clear()
    with pytest.raises(StillWritten):
        scene.ways.fetch(ASKED, [8], scene.piece)
    assert not scene.tcp.fetched
    assert scene.ways.told.transport == "tcp"


def test_a_table_that_is_not_offered_comes_by_tcp_and_others_by_nixl() -> None:
    scene = Scene()
    scene.choose()
    scene.nixl.failure = NotOffered("it is being registered")
    assert scene.fetch() == "tcp"
    scene.nixl.failure = None
    assert (scene.fetch(), scene.ways.told.transport) == ("nixl", "nixl")


def test_closing_closes_both() -> None:
    scene = Scene()
    scene.ways.close()
    assert scene.tcp.closed
    assert scene.nixl.closed
