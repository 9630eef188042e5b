"""The recorder over real block tables: records are matched to their attempts, and the header says what they say."""

from typing import Any

import pytest

from gateway.ledger.attempts import Attempt
from gateway.ledger.ledger import LEFT_STATUS, Ledger
from gateway.ledger.misses import MissReason
from gateway.ledger.recorder import Recorder
from gateway.planner.planner import Planner
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService
from tests.unit.gateway.ledger.begun_attempts import begun
from tests.unit.gateway.planner.planned_fleet import Bounds
from tests.unit.transport.replica_tables import BLOCK_SIZE, ReplicaTables, StandingFleet
from transport.table.deliveries import Delivery, DeliveryReason, FromSource
from transport.table.directory import TableDirectory

TOKENS = 100


class Scene:
    def __init__(self, tables: ReplicaTables) -> None:
        self.tables = tables
        self.now = 1.0
        fleet, tokens = StandingFleet("a", "b", directory=tables.directory), TokenService(TokenizerSource("/no/model/here"))
        self.planner = Planner(fleet, TableDirectory(tables.directory), tokens, Bounds())
        self.recorder = Recorder(Ledger(100), self.planner, lambda: self.now)

    def send(self, tag: int, **changes: Any) -> Attempt:
        attempt = begun(tag, prompt_tokens=TOKENS, block_size=BLOCK_SIZE, began_at=self.now, **changes)
        self.planner.fleet.now()
        self.recorder.ledger.open(attempt)
        return attempt

    def deliver(self, tag: int, replica: str = "a", **figures: Any) -> None:
        computed = TOKENS - figures.get("local_tokens", 0) - figures.get("peer_tokens", 0)
        times = {"arrived_ns": 10, "scheduled_ns": 20, "first_token_ns": 30}
        record = Delivery(tag=tag, **{"prompt_tokens": TOKENS, "computed_tokens": computed, **times, **figures})
        self.tables.writers[replica].deliver(record, "shared_memory")


@pytest.fixture
def scene(two_tables: ReplicaTables) -> Scene:
    return Scene(two_tables)


def reason(attempt: Attempt) -> tuple[MissReason, int]:
    assert attempt.miss is not None
    return attempt.miss.reason, attempt.miss.tokens


def test_the_header_says_what_the_engine_delivered_before_the_first_byte(scene: Scene) -> None:
    held = {"source": "b", "peer_tokens": 64, "best_available_tokens": 96, "best_held_tokens": 96}
    attempt = scene.send(7, **held)
    scene.deliver(7, peer_tokens=64, source="b", why=DeliveryReason.LIMITED)
    assert scene.recorder.first_byte(attempt) == b'local=0, peer=64, computed=36, source="b", reason=load'


def test_the_header_names_all_sources_of_a_mixed_import_and_the_ledger_calls_it_no_mismatch(scene: Scene) -> None:
    attempt = scene.send(7, source="b", peer_tokens=64, best_available_tokens=64, best_held_tokens=64)
    scene.deliver(7, peer_tokens=96, source="b", further=(FromSource("b.host-memory", 32),))
    assert scene.recorder.first_byte(attempt) == (
        b'local=0, peer=96, computed=4, source="b", sources=("b" "b.host-memory"), source_tokens=(64 32), reason=none'
    )
    scene.recorder.ended(attempt, 200)
    assert reason(attempt) == (MissReason.NONE, 0)
    assert scene.recorder.ledger.sums.peer_tokens == 96


def test_only_the_first_of_several_first_bytes_counts(scene: Scene) -> None:
    attempt = scene.send(7)
    scene.now = 1.5
    scene.recorder.first_byte(attempt)
    scene.now = 2.0
    scene.recorder.first_byte(attempt)
    assert attempt.first_byte_seconds == 0.5


def test_without_a_record_there_is_no_header(scene: Scene) -> None:
    attempt = scene.send(7)
    scene.deliver(8)
    assert scene.recorder.first_byte(attempt) == b""
    assert scene.recorder.ledger.sums.unmatched_deliveries == 1


def test_a_request_that_was_aborted_before_it_was_scheduled_has_no_header(scene: Scene) -> None:
    attempt = scene.send(7)
    scene.deliver(7, scheduled_ns=0, first_token_ns=0, computed_tokens=0)
    assert scene.recorder.first_byte(attempt) == b""
    scene.recorder.ended(attempt, LEFT_STATUS)
    assert reason(attempt) == (MissReason.LEFT, 0)


def test_the_header_and_the_ledger_name_the_same_reason(scene: Scene) -> None:
    attempt = scene.send(1, formerly_tokens=64)
    scene.deliver(1)
    assert scene.recorder.first_byte(attempt) == b"local=0, peer=0, computed=100, reason=evicted"
    scene.recorder.ended(attempt, 200)
    assert reason(attempt) == (MissReason.EVICTED, 64)


def test_a_record_in_the_table_of_a_replica_that_died_is_still_read(scene: Scene) -> None:
    attempt = scene.send(1)
    scene.deliver(1)
    scene.tables.stop("a")
    scene.planner.fleet.now()
    scene.recorder.ended(attempt, 200)
    assert reason(attempt) == (MissReason.COLD, 0)


def test_a_replica_that_came_back_is_read_from_its_new_table(scene: Scene) -> None:
    scene.send(1)
    scene.tables.stop("a")
    scene.tables.start("a")
    attempt = scene.send(2)
    scene.deliver(2)
    scene.recorder.ended(attempt, 200)
    assert attempt.deliveries[0].tag == 2


def test_a_late_record_is_found_when_somebody_looks(scene: Scene) -> None:
    attempt = scene.send(1)
    scene.recorder.ended(attempt, 200)
    assert not attempt.settled
    scene.deliver(1)
    scene.recorder.catch_up()
    assert reason(attempt) == (MissReason.COLD, 0)


def test_records_that_were_overwritten_are_counted(scene: Scene) -> None:
    scene.send(1)
    for tag in range(5000):
        scene.deliver(tag + 10)
    scene.recorder.catch_up()
    assert scene.recorder.feed.missed > 0
    assert scene.recorder.feed.missed + scene.recorder.ledger.sums.unmatched_deliveries == 5000


def test_records_of_further_choices_count_though_they_come_after_the_end(scene: Scene) -> None:
    attempt = scene.send(1)
    scene.deliver(1)
    assert scene.recorder.first_byte(attempt)
    scene.recorder.ended(attempt, 200)
    scene.deliver(1, local_tokens=96)
    scene.recorder.catch_up()
    assert (scene.recorder.ledger.sums.local_tokens, scene.recorder.ledger.sums.computed_tokens) == (96, 104)
