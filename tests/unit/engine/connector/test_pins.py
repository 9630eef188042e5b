"""Pinned prefixes: bounded in blocks and time, given back exactly once, and never in the way of a reset or of work."""

from contextlib import closing
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool

from engine.connector.pins import DRY_STEPS_MAX, PINS_MAX, Pins, unpin_before_reset
from tests.unit.engine.connector.scheduler_fixtures import PROMPT, Replica, Request
from transport.hint import PinWish

SECOND = 10**9
BLOCKS = 32


class Pool:
    """Counts references as vLLM's pool does, and takes it ill when one is given back twice."""

    def __init__(self, blocks=BLOCKS):
        self.blocks = [SimpleNamespace(block_id=i, references=0) for i in range(blocks)]
        self.cached_block_hash_to_block = {}

    def touch(self, blocks):
        for block in blocks:
            block.references += 1

    def free_blocks(self, ordered_blocks):
        for block in ordered_blocks:
            block.references -= 1
            assert block.references >= 0

    def reset_prefix_cache(self):
        if any(block.references for block in self.blocks):
            return False
        self.cached_block_hash_to_block = {}
        return True

    @property
    def held(self):
        return {block.block_id: block.references for block in self.blocks if block.references}


def pins(blocks_max, pool):
    made = Pins(blocks_max)
    made.bind_pool(pool)
    return made


def test_a_pin_holds_its_blocks_once_until_its_time_is_over():
    pool = Pool()
    held = pins(8, pool)
    assert held.take(PinWish(1, 2.0), [3, 4, 5], now_ns=0)
    held.expire(2 * SECOND - 1)
    assert (pool.held, held.blocks) == ({3: 1, 4: 1, 5: 1}, 3)
    held.expire(2 * SECOND)
    assert (pool.held, held.blocks) == ({}, 0)


def test_blocks_that_two_pins_share_count_once_and_stay_until_both_end():
    pool = Pool()
    held = pins(4, pool)
    assert held.take(PinWish(1, 1.0), [1, 2, 3], 0)
    assert held.take(PinWish(2, 5.0), [1, 2, 4], 0)
    assert (held.blocks, pool.held) == (4, {1: 1, 2: 1, 3: 1, 4: 1})
    held.expire(SECOND)
    assert pool.held == {1: 1, 2: 1, 4: 1}
    held.drop([2])
    assert pool.held == {}


def test_what_does_not_fit_is_refused_and_what_was_pinned_stays():
    pool = Pool()
    held = pins(4, pool)
    assert held.take(PinWish(1, 1.0), [1, 2, 3], 0)
    assert not held.take(PinWish(2, 1.0), [4, 5], 0)
    assert not held.take(PinWish(3, 1.0), [], 0)
    assert pool.held == {1: 1, 2: 1, 3: 1}


def test_another_wish_under_the_same_number_replaces_the_first():
    pool = Pool()
    held = pins(4, pool)
    assert held.take(PinWish(1, 1.0), [1, 2, 3], 0)
    assert held.take(PinWish(1, 9.0), [1, 2, 4, 5], 0)
    assert pool.held == {1: 1, 2: 1, 4: 1, 5: 1}
    held.expire(8 * SECOND)
    assert held.blocks == 4
    assert not held.take(PinWish(1, 20.0), [1, 2, 4, 5, 6], 0)
    held.expire(9 * SECOND)
    assert pool.held == {}


def test_without_a_pool_or_a_share_every_pin_is_refused():
    assert not Pins(8).take(PinWish(1, 1.0), [1], 0)
    assert not pins(0, Pool()).take(PinWish(1, 1.0), [1], 0)


def test_the_number_of_pins_is_bounded_though_they_share_their_blocks():
    held = pins(8, Pool())
    assert all(held.take(PinWish(n, 1.0), [1], 0) for n in range(PINS_MAX))
    assert not held.take(PinWish(PINS_MAX, 1.0), [1], 0)
    assert held.take(PinWish(7, 1.0), [1], 0)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 4), st.lists(st.integers(0, 9), max_size=6), st.integers(1, 9)),
        st.tuples(st.just("drop"), st.lists(st.integers(0, 4), max_size=3), st.none(), st.none()),
        st.tuples(st.just("expire"), st.integers(0, 9), st.none(), st.none()),
        st.tuples(st.just("clear"), st.none(), st.none(), st.none()),
    ),
    max_size=30,
)


@given(OPERATIONS)
@settings(max_examples=200, deadline=None)
def test_whatever_happens_a_block_has_one_reference_while_a_pin_holds_it_and_none_after(operations):
    pool, model, now = Pool(10), {}, 0
    held = pins(7, pool)
    for name, first, blocks, seconds in operations:
        if name == "take":
            after = {key: value for key, value in model.items() if key != first} | {first: (set(blocks), now + seconds)}
            fits = len(set(blocks)) > 0 and len(set().union(*(part for part, _ in after.values()))) <= 7
            assert held.take(PinWish(first, seconds), blocks, now * SECOND) is fits
            model = after if fits else model
        elif name == "drop":
            held.drop(first)
            model = {key: value for key, value in model.items() if key not in first}
        elif name == "expire":
            now += first
            held.expire(now * SECOND)
            model = {key: value for key, value in model.items() if value[1] > now}
        else:
            held.clear()
            model = {}
        wanted = set().union(*(part for part, _ in model.values()))
        assert pool.held == dict.fromkeys(wanted, 1)
        assert held.blocks == len(wanted)


# With the scheduler half


class Scene:
    """A replica whose pins have a pool, a share of half its 32 blocks, and a clock that is set by hand."""

    def __init__(self, path):
        self.now = 1
        self.pool = Pool()
        self.replica = Replica(path, "replica-0", pin_share_max=0.5, clock_ns=lambda: self.now)
        self.half = self.replica.half
        self.half.bind_pool(self.pool)

    def ask(self, name="r", ids=(5, 6, 7, 8), tokens=PROMPT, computed=0, **hint):
        request = Request(name, list(tokens), kv_transfer_params={"peerkv": hint})
        self.half.arrived(request)
        self.replica.prefill(request, list(ids), computed)
        return request

    @property
    def pinned(self):
        return self.replica.reader.load().pinned_blocks


@pytest.fixture
def scene(tmp_path):
    made = Scene(tmp_path)
    with closing(made.half):
        yield made


PIN = {"id": 1, "seconds": 10.0}


def test_the_full_blocks_of_a_prompt_are_pinned_when_it_is_computed(scene):
    request = Request("r", list(PROMPT), kv_transfer_params={"peerkv": {"pin": PIN}})
    scene.half.arrived(request)
    scene.half.match(request, 0)
    first = scene.replica.schedule(new=[(request, [5, 6], 0, 8)])
    scene.replica.done(first.step)
    assert scene.pool.held == {}
    last = scene.replica.schedule(cached=[(request, [7, 8], 8, 6)])
    request.all_token_ids.append(1)
    scene.replica.done(last.step)
    assert (scene.pool.held, scene.pinned) == ({5: 1, 6: 1, 7: 1}, 3)
    scene.half.finished("r")
    assert scene.replica.held(PROMPT) == [5, 6, 7]
    assert scene.replica.counted()["pins"] == 1


def test_a_last_part_of_a_prompt_that_fills_no_block_pins_it_too(scene):
    request = Request("r", list(PROMPT), kv_transfer_params={"peerkv": {"pin": PIN}})
    scene.half.match(request, 0)
    scene.replica.done(scene.replica.schedule(new=[(request, [5, 6, 7, 8], 0, 13)]).step)
    assert scene.pinned == 0
    last = scene.replica.schedule(cached=[(request, None, 13, 1)])
    request.all_token_ids.append(1)
    scene.replica.done(last.step)
    assert scene.pinned == 3


def test_a_request_that_ended_with_its_first_token_is_pinned_all_the_same(scene):
    request = Request("r", list(PROMPT), kv_transfer_params={"peerkv": {"pin": PIN}})
    scene.half.match(request, 0)
    meta = scene.replica.schedule(new=[(request, [5, 6, 7, 8], 0, 14)])
    request.all_token_ids.append(1)
    scene.half.finished("r")
    scene.replica.done(meta.step)
    assert scene.pinned == 3


def test_blocks_that_were_given_away_meanwhile_are_not_pinned(scene):
    request = Request("r", list(PROMPT), kv_transfer_params={"peerkv": {"pin": PIN}})
    scene.half.match(request, 0)
    meta = scene.replica.schedule(new=[(request, [5, 6, 7, 8], 0, 14)])
    thief = Request("s", list(range(50, 60)))
    scene.half.match(thief, 0)
    scene.replica.schedule(new=[(thief, [6, 9, 10], 0, 10)], preempted=["r"])
    request.all_token_ids.append(1)
    scene.replica.done(meta.step)
    assert scene.pool.held == {}
    assert scene.replica.counted()["pins_refused"] == 1


def test_a_pins_time_ends_with_the_next_step_or_arrival(scene):
    for wake in (lambda: scene.half.arrived(Request("w", [1])), scene.replica.schedule):
        scene.ask("r", pin=PIN)
        scene.now += 10 * SECOND - 1
        wake()
        assert scene.pinned == 3
        scene.now += 1
        scene.half.arrived(Request("x", [1])) if wake is not scene.replica.schedule else wake()
        assert scene.pinned == 0
        for name in ("r", "w", "x"):
            scene.half.finished(name, aborted=True)


def test_a_hint_ends_pins_by_their_numbers(scene):
    scene.ask("r", pin=PIN)
    scene.ask("s", ids=[9, 10, 11], tokens=range(50, 60), pin={"id": 2, "seconds": 5})
    assert scene.pinned == 5
    scene.ask("t", ids=[12, 13], tokens=range(70, 75), unpin=[1, 99])
    assert scene.pool.held == {9: 1, 10: 1}


def test_a_pin_of_more_than_the_share_is_refused_and_counted(scene):
    scene.ask("r", ids=range(17), tokens=range(17 * 4 + 1), pin=PIN)
    assert scene.pinned == 0
    assert scene.replica.counted()["pins_refused"] == 1
    scene.ask("s", ids=range(16), tokens=range(16 * 4 + 1), pin=PIN)
    assert scene.pinned == 16


def test_a_request_that_has_no_keys_can_not_be_pinned_and_is_counted_once(scene):
    request = Request("r", list(PROMPT), pooling_params=object(), kv_transfer_params={"peerkv": {"pin": PIN}})
    scene.half.arrived(request)
    scene.half.match(request, 0)
    scene.replica.prefill(request, [5, 6, 7, 8])
    assert (scene.pinned, scene.replica.counted()["pins_refused"]) == (0, 1)


@pytest.mark.parametrize("end", [lambda half: half.reset(), lambda half: half.withdraw(), lambda half: half.close()])
def test_a_reset_a_fault_and_the_end_give_all_pins_back(scene, end):
    scene.ask("r", pin=PIN)
    end(scene.half)
    assert scene.pool.held == {}


def test_after_a_fault_nothing_is_pinned_any_more(scene):
    scene.half.withdraw()
    scene.ask("r", pin=PIN)
    assert scene.pool.held == {}


def test_a_reset_of_the_pool_succeeds_though_there_are_pins(scene):
    unpin_before_reset(scene.pool, scene.half.unpin)
    scene.ask("r", pin=PIN)
    scene.half.finished("r")
    assert scene.pool.reset_prefix_cache() is True
    assert scene.pinned == 0
    scene.replica.schedule()
    assert scene.replica.held(PROMPT) == []


def test_pins_that_leave_no_room_for_any_work_are_given_up(scene, caplog):
    scene.ask("r", pin=PIN)
    scene.half.finished("r")
    large = Request("large", list(range(200)))
    scene.half.arrived(large)
    for _ in range(DRY_STEPS_MAX - 1):
        scene.half.match(large, 0)
        scene.replica.schedule()
    assert scene.pinned == 3
    scene.half.match(large, 0)
    scene.replica.schedule()
    assert scene.pinned == 0
    assert "no room" in caplog.text


def test_steps_without_work_for_another_reason_cost_no_pins(tmp_path, scene):
    """Nothing waits; a request waits that vLLM does not want to run yet; one waits for its import."""
    scene.ask("r", pin=PIN)
    scene.half.finished("r")
    other = Replica(tmp_path, "replica-1")
    other.prefill(Request("o", list(range(50, 60))), [1, 2, 3])
    waits = Request("w", list(range(300, 310)))
    imports = Request("i", list(range(50, 60)))
    with closing(other.half):
        for request in (None, waits, imports):
            if request is not None:
                scene.half.arrived(request)
            if request is imports:
                scene.half.allocated(imports, ([20, 21, 22],), scene.half.match(imports, 0))
            for _ in range(2 * DRY_STEPS_MAX):
                scene.replica.schedule()
            assert scene.pinned == 3


def test_vllms_own_pool_keeps_pinned_blocks_through_allocations_and_resets():
    pool = BlockPool(num_gpu_blocks=16, enable_caching=True, hash_block_size=4)
    held = pins(8, pool)
    unpin_before_reset(pool, held.clear)
    first = pool.get_new_blocks(4)
    assert held.take(PinWish(1, 1.0), [block.block_id for block in first], 0)
    pool.free_blocks(reversed(first))
    assert pool.get_num_free_blocks() == 11
    rest = pool.get_new_blocks(11)
    assert not {block.block_id for block in rest} & {block.block_id for block in first}
    pool.free_blocks(rest)
    assert pool.reset_prefix_cache()
    assert pool.get_num_free_blocks() == 15
    assert not any(block.ref_cnt for block in pool.blocks)
