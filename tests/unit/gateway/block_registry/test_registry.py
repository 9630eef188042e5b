"""The registry's view of real block tables."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.block_registry.registry import Registry, key_array, obstacles
from tests.unit.transport.replica_tables import BLOCK_SIZE, FIELDS, ReplicaTables, replica_tables
from transport.fingerprint import fingerprint_digest
from transport.groups import Group
from transport.keys import chain_keys, group_keys, root_key
from transport.table.directory import TableDirectory

PROMPT = list(range(100, 100 + 5 * BLOCK_SIZE))


@pytest.fixture
def tables(tmp_path: Path) -> Iterator[ReplicaTables]:
    with replica_tables(tmp_path / "tables") as made:
        yield made


@pytest.fixture
def registry(tables: ReplicaTables) -> Registry:
    return Registry(TableDirectory(tables.directory))


def test_each_replica_holds_the_leading_blocks_that_its_table_has(tables: ReplicaTables, registry: Registry) -> None:
    for name in ("a", "b", "c"):
        tables.start(name)
    tables.hold("a", PROMPT)
    tables.hold("b", PROMPT[: 2 * BLOCK_SIZE])
    look_up = registry.look_up([*PROMPT, 1])
    assert look_up.blocks == {"a": 5, "b": 2}
    assert look_up.places == {"a": 0, "b": 0, "c": 0}
    assert look_up.held_tokens_max == 5 * BLOCK_SIZE


def test_of_a_model_with_windows_a_replica_holds_what_it_can_supply(tables: ReplicaTables, registry: Registry) -> None:
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
    tables: ReplicaTables, registry: Registry
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


def test_a_block_that_ends_with_the_last_token_does_not_count(tables: ReplicaTables, registry: Registry) -> None:
    tables.start("a")
    tables.hold("a", PROMPT)
    assert registry.look_up(PROMPT).blocks == {"a": 4}
    assert registry.look_up(PROMPT[:BLOCK_SIZE]).blocks == {}
    assert registry.look_up([]).blocks == {}


def test_salt_and_adapter_separate_prefixes(tables: ReplicaTables, registry: Registry) -> None:
    tables.start("a")
    tables.hold("a", PROMPT, salt="s", lora="l=/l")
    found = {
        (salt, lora): registry.look_up(PROMPT, salt, lora).blocks.get("a", 0)
        for salt in ("", "s", "t")
        for lora in ("", "l=/l")
    }
    assert found.pop(("s", "l=/l")) == 4
    assert set(found.values()) == {0}


def test_replicas_of_equal_fingerprint_exchange(tables: ReplicaTables, registry: Registry) -> None:
    tables.start("a")
    tables.start("b")
    tables.start("c", fields={**FIELDS, "dtype": "float32"})
    exchanges = registry.exchanges(registry.tables())
    assert exchanges == {"a": {"b"}, "b": {"a"}, "c": set()}


def test_a_chain_is_looked_up_for_each_fingerprint(tables: ReplicaTables, registry: Registry) -> None:
    tables.start("a")
    tables.start("b", fields={**FIELDS, "dtype": "float32"}, block_size=8)
    tables.hold("a", PROMPT)
    tables.hold("b", PROMPT)
    look_up = registry.look_up([*PROMPT, 1])
    assert look_up.blocks == {"a": 5, "b": 2}
    chains = {name: look_up.chains[place] for name, place in look_up.places.items()}
    assert {name: (len(keys), size) for name, (keys, size) in chains.items()} == {"a": (5, 4), "b": (2, 8)}


def test_what_stands_between_two_replicas_is_said_in_words(tables: ReplicaTables, registry: Registry) -> None:
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


def test_a_restarted_replica_holds_nothing_and_exchanges_as_it_is_now(tables: ReplicaTables, registry: Registry) -> None:
    tables.start("a")
    tables.start("b")
    tables.hold("a", PROMPT)
    assert registry.look_up(PROMPT).blocks == {"a": 4}
    assert registry.exchanges(registry.tables())["a"] == {"b"}
    tables.stop("a")
    assert set(registry.look_up(PROMPT).places) == {"b"}
    tables.start("a", fields={**FIELDS, "dtype": "float32"})
    assert registry.look_up(PROMPT).blocks == {}
    assert registry.exchanges(registry.tables())["a"] == frozenset()


def test_the_holders_of_a_block_in_the_middle_of_a_chain_are_found(tables: ReplicaTables, registry: Registry) -> None:
    tables.start("a")
    tables.start("b")
    tables.hold("a", PROMPT)
    tables.hold("b", PROMPT[: 2 * BLOCK_SIZE])
    keys = registry.look_up([*PROMPT, 1]).chains[0][0].keys
    raw = [keys[row].tobytes() for row in (1, 4)]
    assert registry.holders(key_array(raw)) == [["a", "b"], ["a"]]


def test_a_source_that_an_engine_refuses_is_none_for_it_until_one_of_them_is_restarted(
    tables: ReplicaTables, registry: Registry
) -> None:
    for name in "abc":
        tables.start(name)
    registry.tables()
    registry.refused("b", "a")
    registry.refused("b", "nobody")
    assert registry.exchanges(registry.tables()) == {"a": {"b", "c"}, "b": {"c"}, "c": {"a", "b"}}
    tables.stop("a")
    tables.start("a")
    assert registry.exchanges(registry.tables()) == {"a": {"b", "c"}, "b": {"a", "c"}, "c": {"a", "b"}}


def test_a_table_of_a_hash_that_is_not_known_holds_nothing_and_harms_nobody(tables: ReplicaTables, registry: Registry) -> None:
    tables.start("a")
    tables.start("b", hash_name="of_tomorrow")
    tables.hold("a", PROMPT)
    look_up = registry.look_up([*PROMPT, 1])
    assert look_up.blocks == {"a": 5}
    assert set(look_up.places) == {"a"}
