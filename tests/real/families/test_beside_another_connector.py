"""Real engines on the CPU under MultiConnector: beside peerkv's connector vLLM's ExampleConnector, with prompts in files."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.real.families.engines import Family, moving_on, supplied, tokens

SIZE, LENGTH, TRIES_MAX = 32, 400, 25
WHOLE = (LENGTH - 1) // SIZE * SIZE


def both(family: Family, name: str, *, ours_first: bool) -> dict[str, Any]:
    """The configuration of an engine that has both connectors, and a directory of its own for the files."""
    ours = {
        "kv_connector": "PeerKVConnector",
        "kv_connector_module_path": "engine.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"table_dir": str(family.tables), "replica": name},
    }
    files = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(files_of(family, name))},
    }
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [ours, files] if ours_first else [files, ours]},
    }


def files_of(family: Family, name: str) -> Path:
    return family.tables.parent / f"files-of-{name}"


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Iterator[Family]:
    """Engine `a` asks peerkv's connector first, `b` the other one."""
    made = Family(tmp_path_factory.mktemp("beside"), "llama", block_size=SIZE, disable_hybrid_kv_cache_manager=True)
    try:
        for name in ("a", "b"):
            made.start(name, kv_transfer_config=both(made, name, ours_first=name == "a"))
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(("owner", "importer"), [("a", "b"), ("b", "a")])
def test_an_import_beside_another_connector_is_a_local_hit_to_the_last_bit(family, owner, importer):
    ids = tokens(LENGTH, ord(owner))
    cold = family.ask(owner, ids)
    with family.counting(importer) as counted:
        imported = family.ask(importer, ids)
    local = family.ask(importer, ids)
    assert (cold.cached, imported.cached, local.cached) == (0, WHOLE, WHOLE)
    assert counted["peer_tokens_shared_memory"] == WHOLE
    assert imported.same_as(local)
    assert imported.same_as(family.ask(owner, ids))
    assert imported.tokens == cold.tokens


@pytest.mark.parametrize(("owner", "importer"), [("a", "b"), ("b", "a")])
def test_what_the_other_connector_loaded_is_offered_and_imported_to_the_last_bit(family, owner, importer):
    ids = tokens(LENGTH, 10 + ord(owner))
    cold = family.ask(owner, ids)
    assert any(files_of(family, owner).iterdir())
    family[owner].forget()
    with closing(family.table(owner)) as table:
        assert table.cached_blocks() == 0
    loaded = family.ask(owner, ids, source="")
    assert (loaded.cached, loaded.tokens) == (WHOLE, cold.tokens)
    with family.counting(importer) as counted:
        imported = family.ask(importer, ids)
    assert counted["peer_tokens_shared_memory"] == WHOLE
    assert imported.same_as(loaded)
    assert imported.same_as(family.ask(owner, ids))


@pytest.mark.parametrize(("owner", "importer"), [("a", "b"), ("b", "a")])
def test_an_import_that_fails_beside_another_connector_is_computed(family, owner, importer):
    with closing(family.table(owner)) as table:
        for number in range(TRIES_MAX):  # nothing may move for a moment on a busy machine
            ids = tokens(LENGTH, 100 * ord(owner) + number)
            cold = family.ask(owner, ids)
            changed = int(supplied(table, ids).block_ids[3])
            with family.counting(importer) as counted, moving_on(table, family.tables / f"{owner}.table", changed):
                answer = family.ask(importer, ids)
            assert answer.tokens == cold.tokens
            if counted["fallbacks"]:
                break
        assert counted["fallbacks"] == 1
        assert (counted["peer_tokens_shared_memory"], counted["computed_tokens"]) == (3 * SIZE, LENGTH - 3 * SIZE)
