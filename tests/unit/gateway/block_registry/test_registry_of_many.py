"""With many replicas the index answers; what it says is what the tables say."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.block_registry import registry as module
from gateway.block_registry.fleet_watch import FleetWatch
from gateway.block_registry.registry import LISTED_MAX, LookUp, Registry
from tests.unit.transport.replica_tables import BLOCK_SIZE, FIELDS, ReplicaTables, StandingFleet, replica_tables
from transport.groups import Group
from transport.table.directory import TableDirectory
from transport.table.tiers import host_memory_of

PROMPT = [*range(100, 100 + 50 * BLOCK_SIZE), 1]


@pytest.fixture
def tables(tmp_path: Path) -> Iterator[ReplicaTables]:
    with replica_tables(tmp_path / "tables") as made:
        yield made


def asked(watch: FleetWatch, monkeypatch: pytest.MonkeyPatch) -> LookUp:
    """What asking every table tells."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "INDEX_TABLES_MIN", 1 << 20)
        return Registry().look_up(watch.now(), PROMPT)


def filled(watch: FleetWatch) -> Registry:
    registry = Registry()
    while registry.keep_up(watch.now()):
        pass
    return registry


@pytest.mark.parametrize("replicas", [8, LISTED_MAX + 6])
@pytest.mark.parametrize("tiers", [False, True])
def test_the_index_tells_what_all_tables_tell(
    tables: ReplicaTables, monkeypatch: pytest.MonkeyPatch, replicas: int, tiers: bool
) -> None:
    dice = random.Random(replicas)
    names = [f"replica-{number}" for number in range(replicas)]
    for number, name in enumerate(names):
        tables.start(name)
        tables.hold(name, PROMPT[: dice.choice([0, 9, 10, 49, 50]) * BLOCK_SIZE])
        if tiers and number % 3 == 0:
            tables.start(host_memory_of(name))
            tables.hold(host_memory_of(name), PROMPT[: dice.choice([12, 50]) * BLOCK_SIZE])
            tables.writers[host_memory_of(name)].invalidate(range(5))
    watch = FleetWatch(StandingFleet(*names), TableDirectory(tables.directory))
    expected, found = asked(watch, monkeypatch), filled(watch).look_up(watch.now(), PROMPT)
    assert dict(found.blocks) == dict(expected.blocks)
    assert {name: reached for name, (_, reached) in found.tiers.items()} == {
        name: reached for name, (_, reached) in expected.tiers.items()
    }
    assert (found.held_tokens_max, found.divisible, found.places) == (
        expected.held_tokens_max,
        expected.divisible,
        expected.places,
    )
    assert len(found.blocks) == len(expected.blocks)
    assert found.blocks.get("nobody", 0) == 0


def test_a_change_is_seen_by_the_next_look_up(tables: ReplicaTables) -> None:
    names = [f"replica-{number}" for number in range(9)]
    for name in names:
        tables.start(name)
    watch = FleetWatch(StandingFleet(*names), TableDirectory(tables.directory))
    registry = filled(watch)
    assert registry.look_up(watch.now(), PROMPT).blocks == {}
    tables.hold("replica-4", PROMPT)
    assert registry.look_up(watch.now(), PROMPT).blocks == {"replica-4": 50}
    tables.writers["replica-4"].invalidate(range(20, 50))
    assert registry.look_up(watch.now(), PROMPT).blocks == {"replica-4": 20}
    tables.stop("replica-4")
    assert registry.look_up(watch.now(), PROMPT).blocks == {}


def test_a_gateway_that_starts_anew_serves_at_once(tables: ReplicaTables) -> None:
    """The first look-up beside full caches knows who holds what, although the index is empty."""
    names = [f"replica-{number}" for number in range(8)]
    for name in names:
        tables.start(name)
    tables.hold("replica-7", PROMPT)
    watch = FleetWatch(StandingFleet(*names), TableDirectory(tables.directory))
    registry = Registry()
    assert registry.look_up(watch.now(), PROMPT).blocks == {"replica-7": 50}
    assert registry.keep_up(watch.now())  # most tables are not in the index yet
    assert filled(watch).index_keys == 50


def test_models_whose_layers_need_different_parts_ask_their_tables(tables: ReplicaTables) -> None:
    names = [f"replica-{number}" for number in range(9)]
    groups = (Group("full", BLOCK_SIZE), Group("window", BLOCK_SIZE, BLOCK_SIZE + 2))
    for name in names:
        tables.start(name, groups=groups, fields={**FIELDS, "kind": "windows"})
    watch = FleetWatch(StandingFleet(*names), TableDirectory(tables.directory))
    registry = filled(watch)
    assert registry.look_up(watch.now(), PROMPT).blocks == {}
    assert registry.index_keys == 0
