"""The recorder over real block tables: records are matched to their requests, losses judged by what tables and history say."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest

from gateway.block_registry.delivery_feed import DeliveryFeed
from gateway.block_registry.registry import Registry
from gateway.ledger.attempts import Entry
from gateway.ledger.history import SeenPrefixes
from gateway.ledger.ledger import ATTEMPTS_KEPT, LEFT_STATUS, UNREPORTED_SECONDS, Ledger
from gateway.ledger.misses import MissReason
from gateway.ledger.recorder import PROMPT_TOKENS_EACH, SETTLED_TOGETHER, Recorder
from gateway.ledger.waiting_prompts import WaitingPrompts
from tests.unit.gateway.ledger.planned_attempts import planned
from tests.unit.transport.replica_tables import BLOCK_SIZE, ReplicaTables
from transport.table.deliveries import Delivery, DeliveryReason
from transport.table.directory import TableDirectory

IDS = list(range(100, 200))
USEFUL = 96
SALTS = {"one": "salt-1", "two": "salt-2"}


class Scene:
    def __init__(self, tables: ReplicaTables) -> None:
        self.tables = tables
        self.now = 1.0
        registry = Registry(TableDirectory(tables.directory))
        self.registry = registry
        self.recorder = Recorder(
            Ledger(100), SeenPrefixes(1000), DeliveryFeed(registry.tables), registry, SALTS.get, lambda: self.now
        )

    def send(self, tag: int, tenant: str = "one", ids: list[int] = IDS, **changes: Any) -> Entry:
        plan = planned(tag, tenant=tenant, prompt_tokens=len(ids), block_size=BLOCK_SIZE, **changes)
        self.recorder.feed.refresh()
        return self.recorder.sent(plan, ids)

    def deliver(self, tag: int, replica: str = "a", tokens: int = len(IDS), **figures: object) -> None:
        local, peer = figures.get("local_tokens", 0), figures.get("peer_tokens", 0)
        assert isinstance(local, int)
        assert isinstance(peer, int)
        times = {"arrived_ns": 10, "scheduled_ns": 20, "first_token_ns": 30}
        figures = {"prompt_tokens": tokens, "computed_tokens": tokens - local - peer, **times, **figures}
        record = Delivery(tag=tag, **figures)  # type: ignore[arg-type]
        self.tables.writers[replica].deliver(record, "shared_memory")

    def serve(self, tag: int, tenant: str = "one", ids: list[int] = IDS, **changes: Any) -> Entry:
        """A request that is computed whole."""
        entry = self.send(tag, tenant, ids, **changes)
        self.now += 1
        self.deliver(tag, tokens=len(ids))
        self.end(entry)
        return entry

    def end(self, entry: Entry, status: int = 200) -> None:
        """Its answer ends, and somebody looks at the figures."""
        self.recorder.ended(entry, status)
        self.recorder.catch_up()


@pytest.fixture
def scene(two_tables: ReplicaTables) -> Scene:
    return Scene(two_tables)


def reason(entry: Entry) -> tuple[MissReason, int]:
    assert entry.loss is not None
    return entry.loss.reason, entry.loss.tokens


def test_the_header_says_what_the_engine_delivered_before_the_first_byte(scene: Scene) -> None:
    held = {"source": "b", "peer_tokens": 64, "best_available_tokens": 96, "best_held_tokens": 96}
    entry = scene.send(7, **held)
    scene.deliver(7, peer_tokens=64, source="b", why=DeliveryReason.LIMITED)
    assert scene.recorder.first_byte(entry) == b'local=0, peer=64, computed=36, source="b", reason=load'


def test_without_a_record_there_is_no_header(scene: Scene) -> None:
    entry = scene.send(7)
    scene.deliver(8)
    assert scene.recorder.first_byte(entry) == b""
    assert scene.recorder.ledger.sums.unmatched_deliveries == 1


def test_a_request_that_was_aborted_before_it_was_scheduled_has_no_header(scene: Scene) -> None:
    entry = scene.send(7)
    scene.deliver(7, scheduled_ns=0, first_token_ns=0, computed_tokens=0)
    assert scene.recorder.first_byte(entry) == b""
    scene.end(entry, LEFT_STATUS)
    assert reason(entry) == (MissReason.LEFT, 0)


def test_a_first_prompt_is_cold_and_the_next_one_that_nobody_holds_any_more_was_evicted(scene: Scene) -> None:
    assert reason(scene.serve(1)) == (MissReason.COLD, 0)
    found, tokens = reason(scene.serve(2))
    assert found is MissReason.EVICTED
    assert 0.75 * USEFUL <= tokens <= USEFUL


def test_two_equal_prompts_at_one_time_are_both_cold(scene: Scene) -> None:
    entries = [scene.send(tag) for tag in (1, 2)]
    scene.now += 1
    for tag, entry in zip((1, 2), entries, strict=True):
        scene.deliver(tag)
        scene.end(entry, 200)
    assert [reason(entry) for entry in entries] == [(MissReason.COLD, 0)] * 2


def test_a_prompt_that_another_tenants_blocks_hold_stops_at_the_tenant_boundary(scene: Scene) -> None:
    scene.serve(1, "one")
    scene.tables.hold("a", IDS, SALTS["one"])
    entry = scene.serve(2, "two")
    found, tokens = reason(entry)
    assert found is MissReason.TENANT_BOUNDARY
    assert 0.75 * USEFUL <= tokens <= USEFUL


def test_the_header_of_a_tenant_boundary_says_cold(scene: Scene) -> None:
    scene.serve(1, "one")
    scene.tables.hold("a", IDS, SALTS["one"])
    entry = scene.send(2, "two")
    scene.deliver(2)
    header = scene.recorder.first_byte(entry)
    scene.end(entry, 200)
    assert header == b"local=0, peer=0, computed=100, reason=cold"
    assert reason(entry)[0] is MissReason.TENANT_BOUNDARY


def test_what_another_tenant_computed_and_nobody_holds_is_cold(scene: Scene) -> None:
    scene.serve(1, "one")
    assert reason(scene.serve(2, "two")) == (MissReason.COLD, 0)


def test_an_aborted_prompt_was_not_computed_for_anybody(scene: Scene) -> None:
    entry = scene.send(1)
    scene.deliver(1, first_token_ns=0)
    scene.end(entry, LEFT_STATUS)
    scene.now += 1
    assert reason(scene.serve(2)) == (MissReason.COLD, 0)


def test_a_record_in_the_table_of_a_replica_that_died_is_still_read(scene: Scene) -> None:
    entry = scene.send(1)
    scene.deliver(1)
    scene.tables.stop("a")
    scene.registry.tables()
    scene.end(entry, 200)
    assert reason(entry) == (MissReason.COLD, 0)


def test_a_replica_that_came_back_is_read_from_its_new_table(scene: Scene) -> None:
    scene.serve(1)
    scene.tables.stop("a")
    scene.tables.start("a")
    entry = scene.serve(2)
    assert entry.deliveries[0].tag == 2


def test_an_attempt_that_is_forgotten_while_its_record_is_waited_for_is_settled_and_keeps_nothing(scene: Scene) -> None:
    """Or a client that gives all its requests one id and leaves them would fill the memory with their token ids."""
    for tag in range(1, 4 * ATTEMPTS_KEPT):
        scene.recorder.ended(scene.send(tag), LEFT_STATUS)
    assert scene.recorder.waiting < ATTEMPTS_KEPT + SETTLED_TOGETHER
    scene.recorder.catch_up()
    assert scene.recorder.waiting == ATTEMPTS_KEPT
    scene.now += 2 * UNREPORTED_SECONDS
    scene.recorder.catch_up()
    assert scene.recorder.waiting == 0
    assert scene.recorder.ledger.sums.requests_by_reason == {"left": 4 * ATTEMPTS_KEPT - 1}


def test_a_late_record_is_found_when_somebody_looks(scene: Scene) -> None:
    entry = scene.send(1)
    scene.recorder.ended(entry, 200)
    assert entry.loss is None
    scene.deliver(1)
    scene.recorder.catch_up()
    assert reason(entry) == (MissReason.COLD, 0)


def test_records_that_were_overwritten_are_counted(scene: Scene) -> None:
    scene.send(1)
    for tag in range(5000):
        scene.deliver(tag + 10)
    scene.recorder.catch_up()
    assert scene.recorder.feed.missed > 0
    assert scene.recorder.feed.missed + scene.recorder.ledger.sums.unmatched_deliveries == 5000


def test_prompts_of_unsettled_attempts_are_bounded_in_bytes_and_the_oldest_go_first() -> None:
    prompts = WaitingPrompts(bytes_max=4 * 250)
    entries = [Entry(planned(tag), 0.0, IDS) for tag in (1, 2, 3, 4)]
    for entry in entries[:3]:
        prompts.keep(entry)
    assert (len(prompts), [entry.ids is None for entry in entries[:3]]) == (2, [True, False, False])
    prompts.drop(entries[1])
    prompts.keep(entries[3])
    assert entries[2].ids is not None  # what was dropped counts no more
    assert len(prompts) == 2


def test_an_attempt_whose_prompt_was_dropped_is_settled_without_its_history(scene: Scene) -> None:
    scene.serve(1)
    scene.recorder._prompts = WaitingPrompts(bytes_max=0)
    entry = scene.send(2)
    scene.end(entry)
    scene.deliver(2)
    scene.recorder.catch_up()
    assert reason(entry) == (MissReason.COLD, 0)


def test_attempts_are_settled_together_and_all_before_somebody_looks(scene: Scene) -> None:
    entries = [scene.send(tag) for tag in range(1, SETTLED_TOGETHER + 2)]
    for tag, entry in enumerate(entries, 1):
        scene.now += 1
        scene.deliver(tag)
        scene.recorder.ended(entry, 200)
        assert scene.recorder.ledger.sums.settled == (SETTLED_TOGETHER if tag >= SETTLED_TOGETHER else 0)
    scene.recorder.catch_up()
    assert scene.recorder.ledger.sums.settled == SETTLED_TOGETHER + 1


def test_an_attempt_that_is_settled_later_was_computed_when_it_ended(scene: Scene) -> None:
    first = scene.send(1)
    scene.deliver(1)
    scene.now = 2.0
    scene.recorder.ended(first, 200)
    scene.now = 3.0
    second = scene.send(2)
    scene.deliver(2)
    scene.now = 4.0
    scene.end(second)
    assert reason(first) == (MissReason.COLD, 0)
    assert reason(second)[0] is MissReason.EVICTED


def test_records_of_further_choices_count_though_they_come_after_the_end(scene: Scene) -> None:
    entry = scene.send(1)
    scene.deliver(1)
    assert scene.recorder.first_byte(entry)
    scene.recorder.ended(entry, 200)
    scene.deliver(1, local_tokens=96)
    scene.recorder.catch_up()
    assert (scene.recorder.ledger.sums.local_tokens, scene.recorder.ledger.sums.computed_tokens) == (96, 104)


def test_a_defect_in_the_history_of_one_attempt_leaves_the_others_to_be_settled(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [scene.send(tag) for tag in (1, 2, 3)]
    for tag, entry in enumerate(entries, 1):
        scene.deliver(tag)
        scene.recorder.ended(entry, 200)
    monkeypatch.setattr(scene.recorder._seen, "digests", Mock(side_effect=RuntimeError("a defect")))
    with pytest.raises(RuntimeError):
        scene.recorder.catch_up()
    monkeypatch.undo()
    scene.recorder.catch_up()
    assert [entry.settled for entry in entries] == [False, True, True]


def test_a_long_prompt_is_not_held_until_others_end(scene: Scene) -> None:
    ids = list(range(SETTLED_TOGETHER * PROMPT_TOKENS_EACH))
    entry = scene.send(1, ids=ids)
    scene.deliver(1, tokens=len(ids))
    scene.recorder.ended(entry, 200)
    assert entry.settled


def test_no_answer_waits_for_others_to_be_settled(scene: Scene) -> None:
    waiting: list[Callable[[], None]] = []
    scene.recorder._later = waiting.append
    for tag in range(1, SETTLED_TOGETHER + 1):
        assert not waiting
        entry = scene.send(tag)
        scene.deliver(tag)
        scene.recorder.ended(entry, 200)
    assert scene.recorder.ledger.sums.settled == 0
    for work in waiting:
        work()
    assert scene.recorder.ledger.sums.settled == SETTLED_TOGETHER
