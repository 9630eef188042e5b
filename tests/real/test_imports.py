"""A prompt that one replica computed, on the other one: imported, the same to the last bit, and counted."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from tests.real.fleet import until

BLOCK = 32
IDLE_SECONDS_MAX = 10.0
LONG = 1050


def importable(tokens: int) -> int:
    """Tokens of a prompt that can come from a peer: full blocks, and at least one token is computed."""
    return (tokens - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("form", ["text", "ids"])
def test_a_long_prompt_is_imported_and_is_what_a_local_hit_and_a_cold_run_give(fleet, words, form):
    prompt = words.text(LONG) if form == "text" else words.ids(LONG)
    cold = fleet.answer(prompt, replica="replica-0")
    with fleet.counting("replica-1") as first, fleet.counting("replica-0") as owner:
        imported = fleet.answer(prompt, replica="replica-1")
    with fleet.counting("replica-1") as second:
        local = fleet.answer(prompt, replica="replica-1")

    assert (first.prompt, first.local, first.peer, first.computed) == (LONG, 0, importable(LONG), LONG - importable(LONG))
    assert (first.counts["imports"], first.counts["import_blocks"]) == (1, importable(LONG) // BLOCK)
    assert (first.counts["check_failures"], first.counts["fallbacks"]) == (0, 0)
    assert owner.prompt == 0  # the owner had no part in it
    assert (second.local, second.peer) == (importable(LONG), 0)
    assert (cold.cached_tokens, imported.cached_tokens, local.cached_tokens) == (0, importable(LONG), importable(LONG))
    assert imported.same_as(local)
    assert imported.close_to(cold)


def test_an_import_equals_a_run_of_the_same_replica_after_a_flush(fleet, words):
    prompt = words.text(LONG)
    fleet.answer(prompt, replica="replica-0")
    imported = fleet.answer(prompt, replica="replica-1")
    fleet.flush()
    with fleet.counting("replica-1") as counted:
        cold = fleet.answer(prompt, replica="replica-1")
    assert imported.cached_tokens == importable(LONG)
    assert (counted.local, counted.peer, counted.computed) == (0, 0, LONG)
    assert imported.close_to(cold)


@pytest.mark.parametrize("holder", ["replica-0", "replica-1"])
def test_a_holder_that_is_not_busy_keeps_its_prompts(fleet, words, holder):
    prompt, again = words.text(300), []
    fleet.answer(prompt, replica=holder)
    with closing(fleet.table(holder)) as table:
        for _ in range(3):
            until(lambda: table.load().running_requests == 0, IDLE_SECONDS_MAX, "the holder has told that it is idle")
            again.append(fleet.answer(prompt))
    assert {answer.replica for answer in again} == {holder}
    assert {answer.cached_tokens for answer in again} == {importable(300)}


def test_what_a_replica_lacks_of_a_prompt_is_imported_behind_what_it_has(fleet, words):
    whole = words.ids(700)
    fleet.answer(whole[:330], replica="replica-1")
    cold = fleet.answer(whole, replica="replica-0")
    with fleet.counting("replica-1") as counted:
        answer = fleet.answer(whole, replica="replica-1")
    assert (counted.local, counted.peer) == (320, importable(700) - 320)
    assert answer.close_to(cold)


def test_an_imported_prompt_can_be_imported_from_its_importer(fleet, words):
    prompt = words.text(400)
    cold = fleet.answer(prompt, replica="replica-0")
    fleet.answer(prompt, replica="replica-1")
    fleet.forget("replica-0")
    with fleet.counting("replica-0") as counted:
        back = fleet.answer(prompt, replica="replica-0")
    assert counted.peer == importable(400)
    assert back.close_to(cold)


def test_imports_run_side_by_side_with_decoding(fleet, words):
    """Several imports at a time while the importer decodes: each is right, and the stream goes on."""
    prompts = [words.text(300) for _ in range(4)]
    cold = [fleet.answer(prompt, replica="replica-0") for prompt in prompts]
    with fleet.decoding([words.text(20)], "replica-1") as (lines,), ThreadPoolExecutor(4) as pool:
        with fleet.counting("replica-1") as counted:
            answers = list(pool.map(lambda prompt: fleet.answer(prompt, replica="replica-1"), prompts))
        assert next(line for line in lines if line).startswith("data: {")
    assert counted.peer == 4 * importable(300)
    assert all(answer.close_to(wanted) for answer, wanted in zip(answers, cold, strict=True))


def test_the_import_is_at_most_half_of_the_cold_time(fleet, words):
    """Very loose on purpose: `make bench` measures."""
    times = {"replica-0": 0.0, "replica-1": 0.0}
    for _ in range(2):
        prompt = words.text(LONG)
        for replica in times:
            began = time.perf_counter()
            fleet.answer(prompt, replica=replica, max_tokens=1)
            times[replica] += time.perf_counter() - began
    assert times["replica-1"] <= times["replica-0"] / 2
