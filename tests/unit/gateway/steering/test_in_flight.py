"""Requests between their sending and their end: what they weigh and what they teach."""

import pytest

from gateway.block_registry.delivery_feed import DeliveryFeed
from gateway.steering.costs.model import CostModel, ModelKey
from gateway.steering.costs.replica_load import IDLE
from gateway.steering.in_flight import Flight, Flights
from gateway.steering.load import FleetLoad
from transport.table.deliveries import Delivery, EngineLoad, FromSource

KEY = ModelKey("cuda", "m")


class StandingTable:
    """The part of a table that flights read."""

    def __init__(self) -> None:
        self.epoch = 1
        self.words = EngineLoad()
        self.written: list[Delivery] = []

    def load(self) -> EngineLoad:
        return self.words

    def deliveries(self, after: int) -> tuple[int, list[Delivery]]:
        return len(self.written), self.written[after:]


class Sky:
    def __init__(self) -> None:
        self.load, self.costs, self.table = FleetLoad(), CostModel(), StandingTable()
        self.flights = Flights(self.load, self.costs)
        self.feed = DeliveryFeed()
        self.feed.add(self.flights.delivered)
        self.sent: dict[int, Flight] = {}

    def start(
        self, tag: int, *, streamed: bool = True, reports: bool = True, teaches: bool = True, stepless: bool = False
    ) -> None:
        told = (streamed, teaches, reports, stepless)
        flight = Flight(tag, "a", None, 1000, 0, 1000, 5e5, 1.0, None, 0, KEY, IDLE, "cuda_ipc", 0.0, 0.5, *told)
        self.sent[tag] = flight
        self.flights.started(flight, 0.0)

    def first_byte(self, tag: int, now: float) -> None:
        self.flights.first_byte(self.sent[tag], now)

    def finish(self, tag: int, now: float) -> None:
        self.flights.finished(self.sent[tag], now)

    def deliver(self, tag: int, seconds: float) -> None:
        self.table.written.append(
            Delivery(tag=tag, first_token_ns=int(seconds * 1e9), prompt_tokens=1000, computed_tokens=1000)
        )

    def listen(self) -> None:
        self.flights.listen("a", self.table)  # type: ignore[arg-type]
        self.feed.watch({"a": self.table})  # type: ignore[dict-item]
        self.feed.refresh()

    @property
    def learnt(self) -> int:
        return self.costs.report().samples


@pytest.fixture
def sky() -> Sky:
    return Sky()


def test_only_what_an_engines_step_brings_is_waited_for(sky: Sky) -> None:
    sky.start(1)
    sky.start(2, stepless=True)  # of /tokenize, say: the engine may rest meanwhile, and is not to be suspected for that
    assert {name: [flight.tag for flight in found] for name, found in sky.flights.waiting().items()} == {"a": [1]}
    sky.first_byte(1, 0.8)
    assert sky.flights.waiting() == {}


def test_a_streams_first_byte_teaches_once_what_was_delivered_is_known(sky: Sky) -> None:
    sky.start(1)
    sky.first_byte(1, 0.8)
    assert (sky.learnt, sky.load.load("a", 0.8).decoding) == (0, 1)
    sky.deliver(1, 0.79)
    sky.listen()
    assert sky.learnt == 1
    sky.first_byte(1, 0.9)
    sky.finish(1, 2.0)
    assert (sky.learnt, sky.load.in_flight()) == (1, {})


def test_a_delivery_before_the_first_byte_waits_for_it(sky: Sky) -> None:
    sky.start(1)
    sky.deliver(1, 0.79)
    sky.listen()
    assert (sky.learnt, sky.load.load("a", 0.8).waiting) == (0, 0)
    sky.first_byte(1, 0.8)
    assert sky.learnt == 1


def test_an_answer_that_is_no_stream_teaches_by_the_engines_time(sky: Sky) -> None:
    sky.start(1, streamed=False)
    sky.deliver(1, 0.7)
    sky.listen()
    assert (sky.learnt, sky.load.load("a", 0.8).waiting) == (1, 0)
    sky.first_byte(1, 9.0)
    sky.finish(1, 9.0)
    assert sky.learnt == 1
    error = sky.costs.median_error()
    assert error == pytest.approx(0.2 / 0.7)


def test_without_reports_a_stream_teaches_by_what_was_planned_and_others_nothing(sky: Sky) -> None:
    sky.start(1, reports=False)
    sky.first_byte(1, 0.8)
    sky.start(2, streamed=False, reports=False)
    sky.first_byte(2, 9.0)
    sky.finish(2, 9.0)
    assert sky.learnt == 1


def test_what_the_plan_does_not_speak_of_teaches_nothing(sky: Sky) -> None:
    sky.start(1, teaches=False)
    sky.deliver(1, 0.7)
    sky.first_byte(1, 0.8)
    sky.listen()
    sky.finish(1, 1.0)
    assert sky.learnt == 0


def test_a_request_that_was_aborted_teaches_nothing(sky: Sky) -> None:
    sky.start(1)
    sky.table.written.append(Delivery(tag=1, prompt_tokens=1000))
    sky.listen()
    sky.finish(1, 1.0)
    assert (sky.learnt, sky.load.in_flight()) == (0, {})


def test_deliveries_are_read_once_and_a_new_epoch_begins_anew(sky: Sky) -> None:
    sky.start(1)
    sky.deliver(99, 0.1)
    sky.deliver(1, 0.2)
    sky.listen()
    sky.listen()
    sky.table = StandingTable()
    sky.start(2)
    sky.deliver(2, 0.3)
    sky.listen()
    assert (sky.load.load("a", 0.5).waiting, sky.load.in_flight()) == (0, {"a": 2})


def test_the_words_of_an_engine_that_is_gone_are_forgotten(sky: Sky) -> None:
    sky.table.words = EngineLoad(waiting_tokens=5000)
    sky.deliver(99, 0.1)
    sky.listen()
    assert sky.load.load("a", 0.0).engine_tokens == 5000
    sky.flights.keep({})
    assert sky.load.load("a", 0.0).engine_tokens == 0


def test_an_import_that_fell_short_does_not_teach_how_large_a_tokens_kv_is(sky: Sky) -> None:
    sky.start(1, streamed=False)
    sky.table.written.append(
        Delivery(
            tag=1,
            first_token_ns=int(0.9e9),
            prompt_tokens=1000,
            peer_tokens=16,
            computed_tokens=984,
            source="b",
            import_bytes=100_000_000,
            import_wait_ns=int(0.4e9),
            failed_blocks=60,
        )
    )
    before = sky.costs.kv_token_bytes("cuda")
    sky.listen()
    assert (sky.learnt, sky.costs.kv_token_bytes("cuda")) == (1, before)
    assert sky.costs.report().transfers == ()


def test_an_import_from_several_sources_teaches_nothing_of_a_pair(sky: Sky) -> None:
    sky.start(1, streamed=False)
    sky.table.written.append(
        Delivery(
            tag=1,
            first_token_ns=int(0.9e9),
            prompt_tokens=1000,
            peer_tokens=960,
            computed_tokens=40,
            source="b",
            further=(FromSource("b.host-memory", 480),),
            import_bytes=960 * 131072,
            import_wait_ns=int(0.4e9),
        )
    )
    before = sky.costs.kv_token_bytes("cuda")
    sky.listen()
    assert (sky.learnt, sky.costs.kv_token_bytes("cuda")) == (1, before)
    assert sky.costs.report().transfers == ()


def test_an_import_from_host_memory_does_not_teach_what_a_peers_takes(sky: Sky) -> None:
    before = sky.costs.transfer_terms("x", "y", "cuda_ipc", "cuda")
    tier = sky.costs.transfer_terms("x", "y.host-memory", "host_memory", "cuda")
    sky.start(1)
    sky.listen()
    sky.table.written.append(
        Delivery(
            tag=1,
            first_token_ns=int(9e8),
            prompt_tokens=1000,
            peer_tokens=1000,
            source="b.host-memory",
            import_wait_ns=int(8e8),
            import_bytes=1000 * 131072,
        )
    )
    sky.first_byte(1, 0.9)
    sky.listen()
    assert sky.costs.transfer_terms("x", "y", "cuda_ipc", "cuda") == before
    assert sky.costs.transfer_terms("x", "y.host-memory", "host_memory", "cuda")[0] > tier[0]
