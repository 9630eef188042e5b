"""Models of several KV cache groups: what of them is offered, what an import takes, and what it leaves alone."""

from types import SimpleNamespace

import pytest

from engine.connector.step_messages import WorkerReport
from engine.connector.vllm_groups import ModelGroups
from tests.unit.engine.connector.scheduler_fixtures import SIZE, Replica, Request, import_all, keys_of, report
from transport.groups import Group
from transport.hint import HINT
from transport.keys import group_keys
from transport.table.deliveries import DeliveryReason
from transport.table.group_look_up import GroupChain, supply

WINDOWS = ModelGroups((Group("full", SIZE), Group("window", SIZE, 6)), (1, 0), {})
"""A window of six tokens, two blocks at the end of a block; vLLM counts the window's group first."""
STATES = ModelGroups((Group("full", SIZE), Group("state", SIZE)), (0, 1), {})
PROMPT = list(range(100, 118))  # four full blocks and two tokens more


def request(name="r", prompt=PROMPT, **hint):
    return Request(name, list(prompt), {HINT: hint} if hint else None)


def held(replica, groups, tokens=PROMPT):
    """Up to how many tokens the table supplies a prompt."""
    keys = keys_of(tokens)
    found = supply(replica.reader, GroupChain(groups.groups, keys), 0, len(keys) * SIZE)
    return found.tokens if found else 0


def owner_of_windows(path, name="a"):
    """Has computed the prompt: its window's blocks are 1 to 5, full attention's 11 to 15."""
    a = Replica(path, name, groups=WINDOWS)
    a.prefill(request(name), ([1, 2, 3, 4, 5], [11, 12, 13, 14, 15]))
    return a


def owner_of_states(path, name="a", states=((1, 21, 8), (1, 23, 16))):
    """Has computed the prompt in steps that ended at these states."""
    a = Replica(path, name, groups=STATES)
    asked = request(name)
    a.half.match(asked, 0)
    kept = {name: list(states)}
    meta = a.schedule(new=[(asked, ([11, 12, 13, 14, 15], [0, 21, 0, 23, 24]), 0, len(PROMPT))], states=kept)
    asked.all_token_ids.append(1)
    a.done(meta.step)
    return a


def test_a_window_is_imported_from_its_tail_and_full_attention_whole(tmp_path):
    a, b = owner_of_windows(tmp_path), Replica(tmp_path, "b", groups=WINDOWS)
    tokens, meta = import_all(b, request(), ([0, 0, 7, 8], [21, 22, 23, 24]))
    (job,) = meta.imports
    assert (tokens, job.counts) == (16, (4, 2))
    assert job.source_blocks.tolist() == [11, 12, 13, 14, 3, 4]
    assert job.target_blocks.tolist() == [21, 22, 23, 24, 7, 8]
    assert a.reader.unchanged(job.source_blocks, job.states).all()


def test_of_a_state_group_one_block_is_imported_and_only_where_a_state_was_kept(tmp_path):
    _owner = owner_of_states(tmp_path)
    b = Replica(tmp_path, "b", groups=STATES)
    tokens, meta = import_all(b, request(), ([1, 2, 3, 4], [0, 0, 0, 5]))
    (job,) = meta.imports
    assert (tokens, job.counts) == (16, (4, 1))
    assert (job.source_blocks.tolist(), job.target_blocks.tolist()) == ([11, 12, 13, 14, 23], [1, 2, 3, 4, 5])
    shorter = request("s", PROMPT[:15])  # three full blocks, but no state was kept behind the third
    assert b.half.match(shorter, 0) == 8


def test_a_limit_in_the_hint_takes_an_import_to_where_every_group_has_what_it_needs(tmp_path):
    _owner = owner_of_states(tmp_path)
    b = Replica(tmp_path, "b", groups=STATES)
    assert b.half.match(request(source="a", tokens=12), 0) == 8
    assert b.half.match(request("s", source="a", tokens=4), 0) == 0


@pytest.mark.parametrize(("lost", "left"), [(14, 12), (4, 12), (3, 8), (12, 4), (2, 16), (1, 16)])
def test_a_block_that_any_group_has_lost_shortens_what_is_supplied(tmp_path, lost, left):
    a = owner_of_windows(tmp_path)
    assert held(a, WINDOWS) == 16
    a.half.table.invalidate([lost])
    assert held(a, WINDOWS) == left


def test_a_partial_local_hit_is_completed_group_by_group(tmp_path):
    _owner = owner_of_windows(tmp_path)
    b = Replica(tmp_path, "b", groups=WINDOWS)
    asked = request()
    assert b.half.match(asked, 12) == 4
    b.half.allocated(asked, ([0, 0, 7, 8], [21, 22, 23, 24]), 4)  # the block before the last is here already, in both groups
    (job,) = b.schedule().imports
    assert (job.source_blocks.tolist(), job.target_blocks.tolist()) == ([14, 4], [24, 8])
    assert job.counts == (1, 1)


def test_of_two_holders_the_one_that_supplies_more_is_taken(tmp_path):
    a, c = owner_of_windows(tmp_path), owner_of_windows(tmp_path, "c")
    a.half.table.invalidate([4])  # has all of full attention, but not the end of the window
    c.half.table.invalidate([11 + 4])
    b = Replica(tmp_path, "b", groups=WINDOWS)
    _, meta = import_all(b, request(), ([0, 0, 7, 8], [21, 22, 23, 24]))
    assert meta.imports[0].source == "c"


def test_a_failed_import_of_several_groups_counts_for_nothing_and_is_not_tried_again(tmp_path):
    _owner = owner_of_windows(tmp_path)
    b = Replica(tmp_path, "b", groups=WINDOWS)
    asked = request()
    tokens, meta = import_all(b, asked, ([0, 0, 7, 8], [21, 22, 23, 24]))
    assert tokens == 16
    b.done(meta.step, r=report(failed=[8], stale=1))
    assert b.half.match(asked, 0) == 0
    run = b.schedule(new=[(asked, ([1, 2, 3, 4, 5], [11, 12, 13, 14, 15]), 0, len(PROMPT))])
    asked.all_token_ids.append(1)
    b.done(run.step)
    counted = b.counted()
    assert (counted["imports"], counted["fallbacks"], counted["check_failures"]) == (1, 1, 1)
    assert "import_blocks" not in counted
    assert counted["computed_tokens"] == len(PROMPT)
    assert b.reader.deliveries(0)[1][0].why is DeliveryReason.CHECK_FAILED


@pytest.mark.parametrize(
    "ids", [([0, 0, 0, 8], [21, 22, 23, 24]), ([0, 0, 7], [21, 22, 23, 24]), ([0, 0, 7, 8], [21, 22, 23])], ids=str
)
def test_blocks_that_do_not_fit_the_plan_are_an_import_that_failed(tmp_path, ids):
    _owner = owner_of_windows(tmp_path)
    b = Replica(tmp_path, "b", groups=WINDOWS)
    _, meta = import_all(b, request(), ids)
    (job,) = meta.imports
    assert job.source == ""
    assert job.counts


def test_an_imported_prefix_is_offered_onward_and_so_is_its_state(tmp_path):
    a = owner_of_states(tmp_path)
    b = Replica(tmp_path, "b", groups=STATES)
    asked = request()
    _, meta = import_all(b, asked, ([1, 2, 3, 4], [0, 0, 0, 5]))
    b.done(meta.step, r=report())
    run = b.schedule(new=[(asked, ([1, 2, 3, 4, 6], [0, 0, 0, 5, 7]), 16, 2)], states={"r": [(1, 5, 16)]})
    asked.all_token_ids.append(1)
    b.done(run.step)
    a.half.close()
    assert held(b, STATES) == 16
    assert b.counted()["peer_tokens_shared_memory"] == 16


def test_a_state_is_offered_when_its_step_is_done_and_not_if_its_block_was_given_away(tmp_path):
    a = Replica(tmp_path, "a", groups=STATES)
    asked, other = request(), request("o", range(500, 504))
    a.half.match(asked, 0)
    first = a.schedule(new=[(asked, ([1, 2], [0, 3]), 0, 8)], states={"r": [(1, 3, 8)]})
    assert held(a, STATES, PROMPT[:9]) == 0
    second = a.schedule(new=[(other, ([4], [3]), 0, 4)])  # vLLM gave block 3 to another one in the step ahead
    a.done(first.step)
    assert held(a, STATES, PROMPT[:9]) == 0
    a.done(second.step)
    assert held(a, STATES, PROMPT[:9]) == 0


def test_a_state_is_not_offered_if_its_block_was_given_away_before_vllm_told_of_it(tmp_path):
    a = Replica(tmp_path, "a", groups=STATES)
    asked, other = request(), request("o", range(500, 504))
    a.half.match(asked, 0)
    a.done(a.schedule(new=[(asked, ([1, 2], [0, 3]), 0, 8)]).step)
    # 0.33 tells in the next step of a state that speculation went past, and may have given its block away in that step
    meta = a.schedule(new=[(other, ([4], [3]), 0, 4)], states={"r": [(1, 3, 8)]})
    a.done(meta.step)
    assert a.reader.look_up(group_keys(keys_of(PROMPT), 1))[0].tolist() == [False] * 4


def test_a_state_inside_a_block_is_not_offered(tmp_path):
    a = owner_of_states(tmp_path, states=((1, 21, 6), (1, 23, 16)))
    assert a.reader.cached_blocks() == 5


def test_a_block_that_is_copied_to_holds_what_it_did_no_longer(tmp_path):
    a = owner_of_states(tmp_path)
    a.schedule(copies=[23])
    assert held(a, STATES) == 8


def test_of_a_window_only_those_blocks_are_offered_that_vllm_keeps(tmp_path):
    a = Replica(tmp_path, "a", groups=WINDOWS)
    blocks = [SimpleNamespace(block_hash=b"h" if block in (3, 4) else None) for block in range(32)]
    a.half.bind_pool(SimpleNamespace(blocks=blocks, cached_block_hash_to_block={}))
    a.prefill(request("a"), ([0, 2, 3, 4, 5], [11, 12, 13, 14, 15]))
    keys = group_keys(keys_of(PROMPT), 1)
    assert a.reader.look_up(keys)[0].tolist() == [False, False, True, True]
    assert held(a, WINDOWS) == 16


def test_a_reset_withdraws_states_that_are_under_way(tmp_path):
    a = Replica(tmp_path, "a", groups=STATES)
    asked = request()
    a.half.match(asked, 0)
    meta = a.schedule(new=[(asked, ([1, 2], [0, 3]), 0, 8)], states={"r": [(1, 3, 8)]})
    a.half.reset()
    a.done(meta.step)
    assert a.reader.cached_blocks() == 0


def test_a_replica_whose_memory_is_gone_offers_and_imports_nothing_any_more(tmp_path):
    a = owner_of_windows(tmp_path)
    b = owner_of_windows(tmp_path, "b")
    meta = b.schedule()
    b.half.report(WorkerReport(meta.step, unmapped=True))
    assert b.reader.cached_blocks() == 0
    b.prefill(request("more", range(300, 318)), ([1, 2, 3, 4, 5], [11, 12, 13, 14, 15]))
    assert b.reader.cached_blocks() == 0
    assert a.reader.cached_blocks() > 0


def test_the_states_of_a_replica_that_ended_are_not_believed(tmp_path):
    a = owner_of_states(tmp_path)
    b = Replica(tmp_path, "b", groups=STATES)
    a.half.close()
    assert b.half.match(request(), 0) == 0


@pytest.mark.parametrize(("lost", "pinned"), [(None, 1), (4, 0), (13, 0)])
def test_a_pin_holds_what_a_prompt_needs_of_every_group(tmp_path, lost, pinned):
    a = Replica(tmp_path, "a", groups=WINDOWS, pin_share_max=0.5)
    touched = []
    blocks = [SimpleNamespace(block_hash=None if block == lost else b"h", id=block) for block in range(32)]
    a.half.bind_pool(
        SimpleNamespace(blocks=blocks, cached_block_hash_to_block={}, touch=touched.extend, free_blocks=lambda _: None)
    )
    a.prefill(request("a", pin={"id": 1, "seconds": 60}), ([1, 2, 3, 4, 5], [11, 12, 13, 14, 15]))
    assert a.counted().get("pins", 0) == pinned
    assert a.counted().get("pins_refused", 0) == 1 - pinned
    assert sorted(block.id for block in touched) == ([3, 4, 11, 12, 13, 14] if pinned else [])


@pytest.mark.parametrize(("given", "pinned"), [(6, [1, 2, 3, 4, 5]), (5, [])])
def test_a_pin_holds_a_state_only_if_its_block_was_not_given_away_since(tmp_path, given, pinned):
    a = Replica(tmp_path, "a", groups=STATES, pin_share_max=0.5)
    touched = []
    blocks = [SimpleNamespace(block_hash=b"h", id=block) for block in range(32)]
    a.half.bind_pool(
        SimpleNamespace(blocks=blocks, cached_block_hash_to_block={}, touch=touched.extend, free_blocks=lambda _: None)
    )
    asked, other = request(pin={"id": 1, "seconds": 60}), request("o", range(500, 508))
    a.half.match(asked, 0)
    a.done(a.schedule(new=[(asked, ([1, 2, 3, 4], [0, 0, 0, 5]), 0, 16)], states={"r": [(1, 5, 16)]}).step)
    # the state is needed no more: before the prompt's last step is done vLLM gives its block to another, who fills it
    a.done(a.schedule(new=[(other, ([given], [9]), 0, 4)], cached=[(asked, ([7], [8]), 16, 1)]).step)
    last = a.schedule(cached=[(asked, None, 17, 1)])
    asked.all_token_ids.append(1)
    a.done(last.step)
    assert sorted(block.id for block in touched) == pinned
    assert a.counted().get("pins", 0) == bool(pinned)


def test_blocks_of_different_sizes_stand_under_the_keys_at_which_they_end(tmp_path):
    groups = ModelGroups((Group("full", 8), Group("window", 4, 6)), (0, 1), {})
    a, b = Replica(tmp_path, "a", groups=groups), Replica(tmp_path, "b", groups=groups)
    a.prefill(request("a"), ([11, 12, 13], [1, 2, 3, 4, 5]))
    tokens, meta = import_all(b, request(), ([21, 22], [0, 0, 7, 8]))
    (job,) = meta.imports
    assert (tokens, job.counts, job.source_blocks.tolist()) == (16, (2, 2), [11, 12, 3, 4])
