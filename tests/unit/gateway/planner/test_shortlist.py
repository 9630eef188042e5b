"""Of very many replicas a request is weighed on the best holders and on a few that have little to do."""

from pathlib import Path

from gateway.planner.shortlist import ALL_MAX, LOOKED_AT_MAX, PROMISES_MAX, best_first, shortlist, window
from gateway.steering.costs.replica_load import IDLE, ReplicaLoad
from gateway.steering.scoring import HOLDERS_MAX, TAKERS_MAX
from tests.unit.gateway.planner.planned_fleet import LONG, Place
from tests.unit.gateway.prompts.tiny_model import make_model
from tests.unit.transport.replica_tables import BLOCK_SIZE, replica_tables

NAMES = [f"replica-{number:04}" for number in range(1000)]


def test_every_replica_is_looked_at_in_turn_and_none_twice_at_once() -> None:
    seen: list[str] = []
    for turn in range(len(NAMES)):
        found = window(NAMES, turn)
        assert len(set(found)) == len(found) == LOOKED_AT_MAX
        seen += found
    assert {seen.count(name) for name in NAMES} == {LOOKED_AT_MAX}
    assert window(["a", "b"], 7) == ["a", "b"]


def test_the_best_holders_and_the_least_busy_of_those_looked_at_are_weighed() -> None:
    busy = {name: ReplicaLoad(tokens=float(place)) for place, name in enumerate(reversed(NAMES))}
    ready = dict.fromkeys(NAMES[1:])
    found = shortlist(ready, NAMES[:100], NAMES[:60], lambda name: busy.get(name, IDLE))
    assert NAMES[0] not in found  # it takes nothing
    assert found[: 2 * HOLDERS_MAX] == NAMES[1 : 1 + 2 * HOLDERS_MAX]
    assert found[2 * HOLDERS_MAX :] == NAMES[59 : 59 - 2 * TAKERS_MAX : -1]


def test_those_that_compute_a_little_of_a_prompt_do_not_keep_out_who_computes_or_holds_much() -> None:
    promises = dict.fromkeys(NAMES[:500], 16) | {NAMES[700]: 5000, NAMES[701]: 4000}
    found = best_first((), promises, NAMES[900:990])
    assert found[:2] == [NAMES[700], NAMES[701]]
    assert found[PROMISES_MAX : PROMISES_MAX + 2 * HOLDERS_MAX] == NAMES[900 : 900 + 2 * HOLDERS_MAX]
    few = dict.fromkeys(NAMES[3:5], 16)
    assert best_first((), few, NAMES[4:8]) == NAMES[3:8]
    assert best_first(NAMES[6:7], few, NAMES[4:8]) == [NAMES[6], *NAMES[3:6], NAMES[7]]


async def test_a_holder_among_very_many_gets_the_request_and_idle_ones_get_what_nobody_holds(tmp_path: Path) -> None:
    with replica_tables(tmp_path / "many") as tables:
        place = Place(tables, make_model(tmp_path / "model"))
        names = NAMES[: ALL_MAX + 36]
        for name in names:
            tables.start(name, blocks=256)
        place.fleet.become(*names)
        holder = names[77]
        tables.hold(holder, LONG)
        while place.planner.registry.keep_up(place.planner.fleet.now()):
            pass
        plan = await place.plan(LONG)
        assert plan.replica.name == holder
        assert plan.decision.expected.local_tokens == len(LONG) // BLOCK_SIZE * BLOCK_SIZE
        assert (await place.plan(LONG, wanted=names[3])).replica.name == names[3]
        chosen = set()
        for number in range(20):
            plan = await place.plan([7 + number, *LONG])
            place.begin(plan)
            chosen.add(plan.replica.name)
        assert len(chosen) == 20
