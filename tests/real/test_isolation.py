"""Nothing is imported that belongs to somebody else."""

from tests.real.conftest import FRIENDS, ONE, TWO

BLOCK = 32
LENGTH = 400
WHOLE = (LENGTH - 1) // BLOCK * BLOCK


def test_one_tenants_prompt_is_never_imported_for_another(fleet, words):
    prompt, other = words.text(LENGTH), TWO.api_key.get_secret_value()
    cold = fleet.answer(prompt, replica="replica-0")
    with fleet.counting("replica-1") as foreign:
        theirs = fleet.answer(prompt, replica="replica-1", key=other)
    with fleet.counting("replica-1") as own:
        ours = fleet.answer(prompt, replica="replica-1")
    assert (foreign.local, foreign.peer, foreign.computed) == (0, 0, LENGTH)
    assert theirs.cached_tokens == 0
    assert theirs.close_to(cold)
    assert (own.local, own.peer) == (0, WHOLE)  # nor did the other tenant's run help this one
    assert ours.close_to(cold)


def test_tenants_of_a_group_find_each_others_prompts_and_others_do_not(fleet, words):
    prompt = words.text(LENGTH)
    three, four, one, two = (each.api_key.get_secret_value() for each in (*FRIENDS, ONE, TWO))
    cold = fleet.answer(prompt, replica="replica-0", key=three)
    for outsider in (one, two):
        with fleet.counting("replica-1") as foreign:
            theirs = fleet.answer(prompt, replica="replica-1", key=outsider)
        assert (foreign.local, foreign.peer, foreign.computed) == (0, 0, LENGTH)
        assert theirs.close_to(cold)
    with fleet.counting("replica-1") as shared:
        ours = fleet.answer(prompt, replica="replica-1", key=four)
    assert (shared.local, shared.peer) == (0, WHOLE)
    with fleet.counting("replica-0") as at_home:
        again = fleet.answer(prompt, replica="replica-0", key=four)
    assert (at_home.local, at_home.peer) == (WHOLE, 0)
    assert cold.cached_tokens == 0
    assert ours.close_to(cold)
    assert again.close_to(cold)


def test_another_tenants_cache_does_not_attract_a_prompt(fleet, words):
    prompt, other = words.text(LENGTH), TWO.api_key.get_secret_value()
    fleet.answer(prompt, replica="replica-0")
    answers = [fleet.answer(prompt, key=other) for _ in range(2)]
    assert answers[0].cached_tokens == 0
    assert answers[1].cached_tokens == WHOLE
    assert answers[1].replica == answers[0].replica


def test_after_a_flush_nothing_is_imported(fleet, words):
    prompt = words.text(LENGTH)
    cold = fleet.answer(prompt, replica="replica-0")
    fleet.flush()
    with fleet.counting("replica-1") as counted:
        answer = fleet.answer(prompt, replica="replica-1")
    assert (counted.local, counted.peer, counted.computed) == (0, 0, LENGTH)
    assert answer.close_to(cold)


def test_no_cached_block_is_left_after_a_flush(fleet, words):
    fleet.answer(words.text(LENGTH), replica="replica-0")
    assert fleet.replica_stats("replica-0")["cached_blocks"] > 0
    fleet.flush()
    assert fleet.stats()["totals"]["cached_blocks"] == 0
