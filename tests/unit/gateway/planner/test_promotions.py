"""What disk and vault hold is brought up before a request is planned, if that is sooner than computing it."""

import asyncio

import pytest

from engine.frame_tiers.messages import Promoted, TierStats
from engine.frame_tiers.store import StoreStats
from gateway.planner.promotions import QUIET_SECONDS_MIN, UNANSWERED_MAX, Promotions
from gateway.tenants.tenants import TenantContext
from tests.unit.gateway.planner.planned_fleet import LONG, Place
from tests.unit.transport.replica_tables import BLOCK_SIZE
from transport.keys import chain_keys, root_key
from transport.table.quality import lossy_salt

DISK = TierStats((StoreStats("disk"),))
KEYS = (len(LONG) - 1) // BLOCK_SIZE


class Tiers:
    """Answers as it is told, and remembers what it was asked."""

    def __init__(self, answer=None, latest=DISK, seconds=0.0):
        self.answer, self.latest, self.asked, self.clock, self.seconds = answer, latest, [], 0.0, seconds

    async def promote(self, fingerprint, keys, begin, seconds, *, lossy):
        self.asked.append((fingerprint, keys, begin, seconds))
        self.lossy = lossy
        self.clock += self.seconds
        await asyncio.sleep(0)
        return self.answer() if callable(self.answer) else self.answer

    async def flush(self):
        return {}

    def warnings(self):
        return []


@pytest.fixture
def asked(place: Place):
    """Has the planner ask these tiers."""

    def ask(tiers, wait_seconds_max=10.0):
        planner = place.planner
        tiers.clock = planner._clock()
        planner.promotions = Promotions(tiers, planner.costs, wait_seconds_max, lambda: tiers.clock)
        return tiers

    return ask


async def test_the_whole_chain_is_asked_for_behind_what_a_replica_holds(place: Place, asked) -> None:
    tiers = asked(Tiers())
    await place.plan(LONG)
    place.tables.hold("a", LONG[: 3 * BLOCK_SIZE])
    await place.plan(LONG)
    await place.plan(LONG, wanted="b")
    fingerprint = place.planner.fleet.now().tables["a"].fingerprint
    keys = chain_keys(root_key(fingerprint), LONG[:-1], BLOCK_SIZE).tobytes()
    assert [(name, raw, begin) for name, raw, begin, _ in tiers.asked] == [
        (fingerprint, keys, 0),
        (fingerprint, keys, 3 * BLOCK_SIZE),
        (fingerprint, keys, 0),
    ]


async def test_the_tiers_are_told_whether_the_caller_accepts_loss(place: Place, asked) -> None:
    tiers = asked(Tiers())
    for salt, lossy in (("", False), ("s", False), (lossy_salt(""), True), (lossy_salt("s"), True)):
        await place.plan(LONG, tenant=TenantContext("t", salt))
        assert tiers.lossy is lossy


async def test_nobody_is_asked_for_what_a_replica_holds_nor_without_a_store_or_a_wait(place: Place, asked) -> None:
    for tiers, seconds in ((Tiers(latest=None), 1.0), (Tiers(latest=TierStats()), 1.0), (Tiers(), 0.0)):
        asked(tiers, seconds)
        assert (await place.plan(LONG)).request.promotion is None
        assert tiers.asked == []
    tiers = asked(Tiers())
    place.tables.hold("a", LONG)
    assert (await place.plan(LONG)).request.promotion is None
    assert tiers.asked == []


async def test_what_came_up_is_imported_and_teaches_what_that_takes(place: Place, asked) -> None:
    def bring():
        place.tables.start("disk")
        place.tables.hold("disk", LONG)
        return Promoted(1, "disk", KEYS * BLOCK_SIZE, KEYS, 1000, 0.01)

    tiers = asked(Tiers(bring, seconds=0.02))
    plan = await place.plan(LONG)
    assert (plan.source, plan.predicted_tokens) == ("disk", KEYS * BLOCK_SIZE)
    assert plan.request.promotion.source == "disk"
    assert plan.request.promotion.seconds == pytest.approx(0.02)
    counts = place.planner.promotions.counts
    assert (counts.asked, counts.brought, counts.tokens) == (1, 1, KEYS * BLOCK_SIZE)
    learnt = [each for each in place.planner.costs.report().transfers if each.source == "disk"]
    assert [(each.transport, each.samples) for each in learnt] == [("disk", 1)]
    await place.plan(LONG)
    assert len(tiers.asked) == 1  # it is up


async def test_a_request_waits_no_longer_than_computing_would_take_or_than_the_bound(place: Place, asked) -> None:
    tiers = asked(Tiers(), wait_seconds_max=0.05)
    await place.plan(LONG)
    assert [seconds for *_, seconds in tiers.asked] == [0.05]
    tiers = asked(Tiers(), wait_seconds_max=1e9)
    await place.plan(LONG)
    assert 0.05 < tiers.asked[0][3] < 60.0


async def test_replicas_of_several_kinds_make_no_request_wait_longer_than_the_bound(place: Place, asked) -> None:
    place.tables.stop("b")
    place.tables.start("b", fields={"weights": "w1", "dtype": "float32"})
    tiers = asked(Tiers(seconds=0.03), wait_seconds_max=0.05)
    await place.plan(LONG)
    assert [seconds for *_, seconds in tiers.asked] == [0.05, pytest.approx(0.02)]
    tiers = asked(Tiers(seconds=0.06), wait_seconds_max=0.05)
    await place.plan(LONG)
    assert len(tiers.asked) == 1
    answers = iter([Promoted(1, "disk", KEYS * BLOCK_SIZE), Promoted(2, why="not stored")])
    asked(Tiers(lambda: next(answers)))
    assert (await place.plan(LONG)).request.promotion.source == "disk"


async def test_a_store_that_was_slower_than_computing_is_not_asked_until_that_fades(place: Place, asked) -> None:
    tiers = asked(Tiers())
    for _ in range(10):
        place.planner.costs.observe_promotion("disk", "cpu", 100, 100.0, place.planner._clock())
    short = LONG[:121]
    assert (await place.plan(short)).request.promotion is None
    assert tiers.asked == []
    assert place.planner.promotions.counts.too_slow == 1


async def test_a_process_that_hangs_holds_up_few_requests_and_is_tried_again_later(place: Place, asked) -> None:
    tiers = asked(Tiers(None, seconds=1.0))
    for _ in range(2 * UNANSWERED_MAX):
        await place.plan(LONG)
    assert len(tiers.asked) == UNANSWERED_MAX
    tiers.clock += QUIET_SECONDS_MIN
    for _ in range(2):
        await place.plan(LONG)
    assert len(tiers.asked) == UNANSWERED_MAX + 1
    tiers.clock += 2 * QUIET_SECONDS_MIN
    tiers.answer = Promoted(1, why="not stored")
    for _ in range(2):
        await place.plan(LONG)
    assert len(tiers.asked) == UNANSWERED_MAX + 3


async def test_no_answer_is_a_miss_with_a_word(place: Place, asked) -> None:
    asked(Tiers(None))
    plan = await place.plan(LONG)
    assert (plan.source, plan.request.promotion.source, plan.request.promotion.why) == (None, "", "no answer in time")
