"""The registry's view of real block tables."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from gateway.block_registry.fleet_state import FleetState, obstacles
from gateway.block_registry.fleet_watch import FleetWatch
from gateway.block_registry.registry import LookUp, Registry, holders, key_array
from gateway.block_registry.tables import Table
from tests.unit.transport.replica_tables import BLOCK_SIZE, FIELDS, ReplicaTables, StandingFleet, replica_tables
from transport.fingerprint import fingerprint_digest
from transport.groups import Group
from transport.keys import chain_keys, group_keys, root_key
from transport.table.directory import TableDirectory

PROMPT = list(range(100, 100 + 5 * BLOCK_SIZE))


@pytest.fixture
def tables(tmp_path: Path) -> Iterator[ReplicaTables]:
    with replica_tables(tmp_path / "tables") as made:
        yield made


class Place:
    """A registry over the tables of a fleet."""

    def __init__(self, tables: ReplicaTables) -> None:
        self.fleet = StandingFleet("a", "b")
        self.watch = FleetWatch(self.fleet, TableDirectory(tables.directory))
        self._registry = Registry()

    def look_up(self, ids: Sequence[int], salt: str = "", lora: str = "") -> LookUp:
        return self._registry.look_up(self.watch.now(), ids, salt, lora)

    def tables(self) -> Mapping[str, Table]:
        return self.watch.now().tables

    def sources(self) -> Mapping[str, frozenset[str]]:
        return self.watch.now().sources


@pytest.fixture
def registry(tables: ReplicaTables) -> Place:
    return Place(tables)


def test_each_replica_holds_the_leading_blocks_that_its_table_has(tables: ReplicaTables, registry: Place) -> None:
    for name in ("a", "b", "c"):
        tables.start(name)
    tables.hold("a", PROMPT)
    tables.hold("b", PROMPT[: 2 * BLOCK_SIZE])
    look_up = registry.look_up([*PROMPT, 1])
    assert look_up.blocks == {"a": 5, "b": 2}
    assert look_up.places == {"a": 0, "b": 0, "c": 0}
    assert look_up.held_tokens_max == 5 * BLOCK_SIZE


def test_of_a_model_with_windows_a_replica_holds_what_it_can_supply(tables: ReplicaTables, registry: Place) -> None:
    groups = (Group("full", BLOCK_SIZE), Group("window", BLOCK_SIZE, BLOCK_SIZE + 2))  # two blocks at the end of a block
    windows = {"a": (), "b": (2, 3), "c": (0, 2, 3, 4), "d": (4,)}
    for name, held in windows.items():
        writer = tables.start(name, groups=groups)
        tables.hold(name, PROMPT)
        keys = group_keys(chain_keys(root_key(fingerprint_digest(FIELDS)), PROMPT, BLOCK_SIZE), 1)
        writer.publish([100 + block for block in held], keys[list(held)])
    look_up = registry.look_up([*PROMPT, 1])
    assert look_up.blocks == {"b": 4, "c": 5}
    assert not look_up.divisible


def test_a_model_with_states_that_holds_nothing_leaves_what_others_hold_divisible(
    tables: ReplicaTables, registry: Place
) -> None:
    tables.start("a")
    tables.hold("a", PROMPT)
    groups = (Group("full", BLOCK_SIZE), Group("state", BLOCK_SIZE))
    writer = tables.start("b", fields={**FIELDS, "groups": "other"}, groups=groups)
    assert registry.look_up([*PROMPT, 1]).divisible
    tables.hold("b", PROMPT)
    keys = chain_keys(root_key(fingerprint_digest({**FIELDS, "groups": "other"})), PROMPT, BLOCK_SIZE)
    writer.publish([100], group_keys(keys, 1)[:1])
    look_up = registry.look_up([*PROMPT, 1])
    assert look_up.blocks == {"a": 5, "b": 1}
    assert not look_up.divisible


def test_a_block_that_ends_with_the_last_token_does_not_count(tables: ReplicaTables, registry: Place) -> None:
    tables.start("a")
    tables.hold("a", PROMPT)
    assert registry.look_up(PROMPT).blocks == {"a": 4}
    assert registry.look_up(PROMPT[:BLOCK_SIZE]).blocks == {}
    assert registry.look_up([]).blocks == {}


def test_salt_and_adapter_separate_prefixes(tables: ReplicaTables, registry: Place) -> None:
    tables.start("a")
    tables.hold("a", PROMPT, salt="s", lora="l=/l")
    found = {
        (salt, lora): registry.look_up(PROMPT, salt, lora).blocks.get("a", 0)
        for salt in ("", "s", "t")
        for lora in ("", "l=/l")
    }
    assert found.pop(("s", "l=/l")) == 4
    assert set(found.values()) == {0}


def test_replicas_of_equal_fingerprint_exchange(tables: ReplicaTables, registry: Place) -> None:
    tables.start("a")
    tables.start("b")
    tables.start("c", fields={**FIELDS, "dtype": "float32"})
    assert registry.sources() == {"a": {"b"}, "b": {"a"}, "c": set()}


def test_a_chain_is_looked_up_for_each_fingerprint(tables: ReplicaTables, registry: Place) -> None:
    tables.start("a")
    tables.start("b", fields={**FIELDS, "dtype": "float32"}, block_size=8)
    tables.hold("a", PROMPT)
    tables.hold("b", PROMPT)
    look_up = registry.look_up([*PROMPT, 1])
    assert look_up.blocks == {"a": 5, "b": 2}
    chains = {name: look_up.chains[place] for name, place in look_up.places.items()}
    assert {name: (len(keys), size) for name, (keys, size) in chains.items()} == {"a": (5, 4), "b": (2, 8)}


def test_what_stands_between_two_replicas_is_said_in_words(tables: ReplicaTables, registry: Place) -> None:
    tables.start("a")
    tables.start("b", fields={**FIELDS, "dtype": "float32"})
    tables.start("c", transport="cuda_ipc")
    tables.start("d", status="hybrid models are not handled")
    tables.start("e", block_size=8)
    known = registry.tables()
    assert obstacles(known["a"], known["a"]) == ()
    assert obstacles(known["a"], known["b"]) == ("dtype: bfloat16 here, float32 there",)
    assert obstacles(known["a"], known["c"]) == ("transport: shared_memory here, cuda_ipc there",)
    assert obstacles(known["d"], known["a"]) == ("it does not exchange: hybrid models are not handled",)
    assert obstacles(known["a"], known["e"]) == ("block size: 4 here, 8 there",)


def test_a_restarted_replica_holds_nothing_and_exchanges_as_it_is_now(tables: ReplicaTables, registry: Place) -> None:
    tables.start("a")
    tables.start("b")
    tables.hold("a", PROMPT)
    assert registry.look_up(PROMPT).blocks == {"a": 4}
    assert registry.sources()["a"] == {"b"}
    tables.stop("a")
    assert set(registry.look_up(PROMPT).places) == {"b"}
    tables.start("a", fields={**FIELDS, "dtype": "float32"})
    assert registry.look_up(PROMPT).blocks == {}
    assert registry.sources()["a"] == frozenset()


def test_the_holders_of_a_block_in_the_middle_of_a_chain_are_found(tables: ReplicaTables, registry: Place) -> None:
    tables.start("a")
    tables.start("b")
    tables.hold("a", PROMPT)
    tables.hold("b", PROMPT[: 2 * BLOCK_SIZE])
    keys = registry.look_up([*PROMPT, 1]).chains[0][0].keys
    raw = [keys[row].tobytes() for row in (1, 4)]
    assert holders(registry.tables(), key_array(raw)) == [["a", "b"], ["a"]]


def test_a_source_that_an_engine_refuses_is_none_for_it_until_one_of_them_is_restarted(
    tables: ReplicaTables, registry: Place
) -> None:
    for name in "abc":
        tables.start(name)
    registry.tables()
    registry.watch.refused("b", "a")
    registry.watch.refused("b", "nobody")
    assert registry.sources() == {"a": {"b", "c"}, "b": {"c"}, "c": {"a", "b"}}
    tables.stop("a")
    tables.start("a")
    assert registry.sources() == {"a": {"b", "c"}, "b": {"a", "c"}, "c": {"a", "b"}}


def test_a_table_of_a_hash_that_is_not_known_holds_nothing_and_harms_nobody(tables: ReplicaTables, registry: Place) -> None:
    tables.start("a")
    tables.start("b", hash_name="of_tomorrow")
    tables.hold("a", PROMPT)
    look_up = registry.look_up([*PROMPT, 1])
    assert look_up.blocks == {"a": 5}
    assert set(look_up.places) == {"a"}


def test_a_state_stays_the_same_until_the_fleet_or_a_table_changes_and_then_everybody_is_told_once(
    tables: ReplicaTables, registry: Place
) -> None:
    told: list[FleetState] = []
    registry.watch.on_change(told.append)
    tables.start("a")
    before = registry.watch.now()
    assert registry.watch.now() is before is registry.watch.latest
    assert (list(before.ready), before.names, list(before.tables)) == (["a", "b"], ["a", "b"], ["a"])
    registry.fleet.become("b", "a")
    moved = registry.watch.now()
    assert (list(moved.ready), moved.names) == (["b", "a"], ["a", "b"])
    tables.start("b")
    exchanging = registry.watch.now()
    assert told == [before, moved, exchanging]
    assert (exchanging.ready["a"].sources, moved.ready["a"].sources) == ({"b"}, set())  # a state never changes
    registry.watch.refused("a", "b")
    assert registry.watch.now().ready["a"].sources == set()
    assert len(told) == 3  # whom somebody reads changes neither the replicas nor their tables


def test_a_replica_that_has_just_become_ready_has_its_table_at_once(tables: ReplicaTables) -> None:
    fleet = StandingFleet()
    watch = FleetWatch(fleet, TableDirectory(tables.directory, hold_seconds=3600.0))
    assert not watch.now().tables
    tables.start("a")
    assert not watch.now().tables  # the kernel was asked a moment ago
    fleet.become("a")
    assert list(watch.now().tables) == ["a"]


def test_a_state_without_some_replicas_still_has_their_tables(tables: ReplicaTables, registry: Place) -> None:
    tables.start("a")
    tables.start("b")
    rest = registry.watch.now().without({"a"})
    assert (list(rest.ready), rest.names, sorted(rest.tables)) == (["b"], ["b"], ["a", "b"])
    assert rest.ready["b"].sources == {"a"}


def test_without_imports_nobody_has_a_source(tables: ReplicaTables) -> None:
    tables.start("a")
    tables.start("b")
    state = FleetWatch(StandingFleet("a", "b"), TableDirectory(tables.directory), imports=False).now()
    assert not any(state.sources.values())


def test_a_tier_is_no_replica_and_gives_what_it_holds_behind_what_a_replica_has(tables: ReplicaTables, registry: Place) -> None:
    tables.start("a")
    tables.start("b")
    stored = tables.start("a.host-memory")
    tables.hold("a", PROMPT[: 2 * BLOCK_SIZE])
    keys = chain_keys(root_key(fingerprint_digest(FIELDS)), PROMPT, BLOCK_SIZE)
    stored.publish([0, 1, 2], keys[2:])
    look_up = registry.look_up([*PROMPT, 1])
    assert look_up.blocks == {"a": 2}
    assert look_up.tiers == {"a": ("a.host-memory", 5)}
    assert (look_up.held_tokens_max, look_up.places) == (5 * BLOCK_SIZE, {"a": 0, "b": 0})
    stored.publish([3, 4], keys[:2])
    assert registry.look_up([*PROMPT, 1]).tiers == {"a": ("a.host-memory", 5), "b": ("a.host-memory", 5)}
    assert registry.look_up([*PROMPT, 1], "salt").tiers == {}
    assert set(registry.tables()) == {"a", "b"}
    assert set(registry.watch.latest.tiers) == {"a.host-memory"}
    assert registry.sources() == {"a": {"b"}, "b": {"a"}}
    tables.stop("a")
    assert registry.look_up([*PROMPT, 1]).tiers == {"b": ("a.host-memory", 5)}  # what it computed is still there
    tables.stop("a.host-memory")
    assert registry.look_up([*PROMPT, 1]).tiers == {}


@pytest.mark.parametrize("about", [{"fields": {"weights": "w2"}}, {"transport": "cuda_ipc"}, {"status": "broken"}])
def test_a_tier_that_does_not_fit_gives_nothing(tables: ReplicaTables, registry: Place, about: dict) -> None:
    tables.start("a")
    tables.start("a.host-memory", **about)
    tables.hold("a.host-memory", PROMPT)
    assert registry.look_up([*PROMPT, 1]).tiers == {}


def test_a_tier_that_an_engine_does_not_read_gives_it_nothing_more(tables: ReplicaTables, registry: Place) -> None:
    for name in ("a", "b", "a.host-memory"):
        tables.start(name)
    tables.hold("a.host-memory", PROMPT)
    whole = ("a.host-memory", 5)
    assert registry.look_up([*PROMPT, 1]).tiers == {"a": whole, "b": whole}
    registry.watch.refused("b", "a.host-memory")
    assert registry.look_up([*PROMPT, 1]).tiers == {"a": whole}
    tables.stop("b")
    tables.start("b")
    assert registry.look_up([*PROMPT, 1]).tiers == {"a": whole, "b": whole}


def test_of_a_model_with_windows_a_tier_gives_what_is_missing(tables: ReplicaTables, registry: Place) -> None:
    groups = (Group("full", BLOCK_SIZE), Group("window", BLOCK_SIZE, BLOCK_SIZE + 2))
    keys = chain_keys(root_key(fingerprint_digest(FIELDS)), PROMPT, BLOCK_SIZE)
    mine, stored = (tables.start(name, groups=groups) for name in ("a", "a.host-memory"))
    mine.publish([0, 1], keys[:2])
    mine.publish([2, 3], group_keys(keys[:2], 1))
    stored.publish([0, 1, 2], keys[2:])
    stored.publish([3, 4], group_keys(keys, 1)[3:])
    look_up = registry.look_up([*PROMPT, 1])
    assert look_up.tiers == {"a": ("a.host-memory", 5)}
    assert not look_up.divisible


def test_without_imports_nothing_comes_from_a_tier(tables: ReplicaTables) -> None:
    tables.start("a")
    tables.start("a.host-memory")
    tables.hold("a.host-memory", PROMPT)
    watch = FleetWatch(StandingFleet("a"), TableDirectory(tables.directory), imports=False)
    assert Registry().look_up(watch.now(), [*PROMPT, 1]).tiers == {}
