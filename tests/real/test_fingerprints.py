"""Replicas that differ in anything that changes KV bytes exchange nothing: one field at a time, on a real importer.

The test is the owner: its table says that it holds a prompt, in replica-0's own memory, so that only the comparison of the
fingerprints stands between replica-1 and blocks that would even be right.
"""

from contextlib import closing

import msgspec
import pytest

from tests.real.owner import held, keys_of, table_like

FIELDS = (
    "vllm", "torch", "weights", "revision", "model config", "rope", "tokenizer", "dtype", "quantization", "kv dtype",
    "groups", "tensor parallel size", "pipeline parallel size", "hash", "device", "attention backend", "strides", "kv scales",
    "namespace", "media", "layer names", "cpu layout",
)  # fmt: skip
LENGTH = 80
WHOLE = 64
NAME = "replica-x"


@pytest.fixture(scope="module")
def prompt(running_fleet, words):
    """Ids of a prompt that replica-0 holds, and its answer."""
    running_fleet.wait_ready()
    ids = words.ids(LENGTH)
    return ids, running_fleet.answer(ids, replica="replica-0")


def ask(fleet, ids, salt, source=NAME):
    """Replica-1's answer, and what it counted, when it may import from `source`; it knows nothing of the prompt before."""
    fleet.forget("replica-1")
    with fleet.counting("replica-1") as counted:
        hint = {"peerkv": {"source": source}}
        answer = fleet.direct("replica-1", ids, cache_salt=salt, kv_transfer_params=hint)
    return answer, counted


def test_the_tested_fields_are_all_there_are(fleet):
    with closing(fleet.table("replica-0")) as table:
        assert set(FIELDS) == set(table.fingerprint_fields)


def test_a_table_that_differs_in_its_name_alone_is_imported_from(fleet, prompt, salt):
    """The control: without it the tests below could not fail."""
    ids, wanted = prompt
    with closing(fleet.table("replica-0")) as like, table_like(fleet.table_dir, NAME, like) as table:
        table.publish(held(like, ids, salt).block_ids.tolist(), keys_of(like, ids, salt))
        answer, counted = ask(fleet, ids, salt)
    assert (counted.peer, counted.counts["peers_incompatible"]) == (WHOLE, 0)
    assert answer.close_to(wanted)


@pytest.mark.parametrize("field", FIELDS)
def test_a_table_with_another_fingerprint_is_not_imported_from(fleet, prompt, salt, field):
    ids, wanted = prompt
    with closing(fleet.table("replica-0")) as like:
        blocks = held(like, ids, salt).block_ids.tolist()
        fields = dict(like.fingerprint_fields) | {field: like.fingerprint_fields[field] + " other"}
        with table_like(fleet.table_dir, NAME, like, fingerprint=fields) as table:
            for keys in (keys_of(like, ids, salt, fields), keys_of(like, ids, salt)):  # its own keys; the importer's
                table.clear()
                table.publish(blocks, keys)
                answer, counted = ask(fleet, ids, salt)
                assert (counted.local, counted.peer, counted.computed) == (0, 0, LENGTH)
                assert answer.close_to(wanted)
            stats = fleet.replica_stats("replica-1")
    assert stats["counts"]["peers_incompatible"] > 0
    assert [reason for reason in stats["incompatible"][NAME] if reason.startswith(f"{field}:")]


@pytest.mark.parametrize(
    "change",
    [{"status": "it does not want to"}, {"hash_name": "sha256"}, {"transport": "cuda_ipc"}],
    ids=lambda c: next(iter(c)),
)
def test_a_table_that_does_not_fit_is_not_imported_from(fleet, prompt, salt, change):
    ids, wanted = prompt
    with closing(fleet.table("replica-0")) as like, table_like(fleet.table_dir, NAME, like, **change) as table:
        table.publish(held(like, ids, salt).block_ids.tolist(), keys_of(like, ids, salt))
        answer, counted = ask(fleet, ids, salt)
    assert (counted.peer, counted.computed) == (0, LENGTH)
    assert answer.close_to(wanted)


def test_another_salt_in_the_keys_is_not_imported_from(fleet, prompt, salt):
    ids, wanted = prompt
    with closing(fleet.table("replica-0")) as like, table_like(fleet.table_dir, NAME, like) as table:
        table.publish(held(like, ids, salt).block_ids.tolist(), keys_of(like, ids, salt + "x"))
        answer, counted = ask(fleet, ids, salt)
    assert (counted.peer, counted.computed) == (0, LENGTH)
    assert answer.close_to(wanted)


def test_memory_that_is_not_there_is_a_miss(fleet, prompt, salt):
    """The table promises blocks, its memory cannot be opened: computed, and counted as a fallback."""
    ids, wanted = prompt
    with closing(fleet.table("replica-0")) as like:
        (memory,) = like.memories
        regions = tuple(
            msgspec.structs.replace(region, handle=region.handle.replace('"fd":', '"fd":9')) for region in memory.regions
        )
        gone = msgspec.structs.replace(memory, regions=regions)
        with table_like(fleet.table_dir, NAME, like, memories=(gone,)) as table:
            table.publish(held(like, ids, salt).block_ids.tolist(), keys_of(like, ids, salt))
            answer, counted = ask(fleet, ids, salt)
    assert (counted.peer, counted.computed, counted.counts["fallbacks"]) == (0, LENGTH, 1)
    assert answer.close_to(wanted)
