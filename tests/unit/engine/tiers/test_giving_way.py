"""The order in which a tier's blocks give way."""

from hypothesis import given
from hypothesis import strategies as st

from engine.tiers.giving_way import GivingWay

SLOTS = 6


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def filled(*asked: int) -> GivingWay:
    """Blocks 0, 1, … in the slots of these numbers, stored in this order."""
    found = GivingWay({})
    for slot, times in enumerate(asked):
        found.put(key(slot), slot, times)
    return found


def popped(blocks: GivingWay) -> list[int]:
    found = []
    while (slot := blocks.pop()) is not None:
        found.append(slot)
    return found


def test_the_one_that_was_asked_for_least_often_gives_way_and_of_equal_ones_the_oldest() -> None:
    assert popped(filled(2, 1, 3, 1)) == [1, 3, 0, 2]


def test_blocks_that_were_all_asked_for_once_give_way_as_in_an_lru_cache() -> None:
    blocks = filled(1, 1, 1)
    blocks.used(key(0), 1)
    assert [blocks.pop(), blocks.pop()] == [1, 2]
    blocks.put(key(3), 3, 1)
    assert popped(blocks) == [0, 3]


def test_what_was_popular_once_gives_way_to_what_is_asked_for_now() -> None:
    blocks = filled(4, 1)
    given_way = []
    for number in range(2, 10):
        slot = blocks.pop()
        assert slot is not None
        given_way.append(slot)
        blocks.put(key(number), slot, 1)
    assert given_way == [1, 1, 1, 0, 1, 0, 1, 0]


def test_asking_again_raises_the_value_and_an_estimate_that_fell_does_not_lower_it() -> None:
    blocks = filled(1, 2, 3)
    blocks.used(key(0), 5)
    blocks.used(key(2), 1)
    assert popped(blocks) == [1, 2, 0]


def test_the_next_to_give_way_are_told_in_their_order_but_for_those_that_are_read() -> None:
    blocks = filled(2, 1, 3, 1, 1)
    blocks.hold(3)
    assert (list(blocks.next(3)), list(blocks.next(9))) == ([1, 4, 0], [1, 4, 0, 2])
    blocks.pop_this(0)
    assert popped(blocks) == [1, 4, 2]


def test_a_block_can_give_way_before_its_time_but_not_while_it_is_read() -> None:
    blocks = filled(1, 2, 3)
    blocks.hold(0)
    assert [blocks.drop(0), blocks.drop(1), blocks.drop(1), blocks.drop(7)] == [False, True, False, False]
    assert key(1) not in blocks
    blocks.release(0)
    assert popped(blocks) == [0, 2]


def test_what_is_being_read_does_not_give_way_before_all_its_reads_ended() -> None:
    blocks = filled(1, 2)
    blocks.hold(0)
    blocks.hold(0)
    blocks.used(key(0), 1)
    blocks.release(0)
    assert popped(blocks) == [1]
    blocks.release(0)
    blocks.release(0)
    assert popped(blocks) == [0]


def test_what_was_there_before_counts_as_asked_for_once() -> None:
    blocks = GivingWay({key(0): 5, key(1): 3})
    blocks.put(key(2), 0, 1)
    assert (len(blocks), key(1) in blocks, blocks.key(3), blocks.key(4)) == (3, True, key(1), None)
    assert popped(blocks) == [5, 3, 0]


def test_what_is_cleared_is_forgotten_with_its_readers() -> None:
    blocks = filled(1, 9)
    blocks.hold(0)
    assert sorted(blocks.clear()) == [0, 1]
    assert (len(blocks), blocks.pop(), key(0) in blocks) == (0, None, False)
    blocks.put(key(0), 0, 1)
    blocks.release(0)
    assert popped(blocks) == [0]


class Model:
    """The same by looking at every block."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int, int]] = {}  # value and age by slot; the slot is the key
        self.readers: dict[int, int] = {}
        self.level = self.age = 0

    def set(self, slot: int, value: int) -> None:
        self.age += 1
        self.blocks[slot] = (value, self.age)

    def release(self, slot: int) -> None:
        if self.readers.get(slot, 0):
            self.readers[slot] -= 1
            if not self.readers[slot]:
                self.set(slot, max(self.blocks[slot][0], self.level))

    def pop(self) -> int | None:
        free = [slot for slot in self.blocks if not self.readers.get(slot)]
        if not free:
            return None
        slot = min(free, key=self.blocks.__getitem__)
        self.level = self.blocks.pop(slot)[0]
        return slot


STEPS = st.tuples(st.sampled_from(["used", "hold", "release", "pop", "used"]), st.integers(0, SLOTS - 1), st.integers(1, 9))


@given(st.lists(STEPS, max_size=80))
def test_any_steps_give_way_as_in_a_model_that_looks_at_every_block(steps: list[tuple[str, int, int]]) -> None:
    blocks, model = GivingWay({}), Model()
    for what, slot, asked in steps:
        here = slot in model.blocks
        assert (key(slot) in blocks, len(blocks)) == (here, len(model.blocks))
        if what == "pop":
            assert blocks.pop() == model.pop()
        elif what == "release":
            blocks.release(slot)
            model.release(slot)
        elif what == "hold" and here:
            blocks.hold(slot)
            model.readers[slot] = model.readers.get(slot, 0) + 1
        elif what == "used" and here:
            blocks.used(key(slot), asked)
            model.set(slot, max(model.blocks[slot][0], model.level + asked))
        elif what == "used":
            blocks.put(key(slot), slot, asked)
            model.set(slot, model.level + asked)
    for slot in range(SLOTS):
        while model.readers.get(slot):
            blocks.release(slot)
            model.release(slot)
    assert popped(blocks) == [model.pop() for _ in range(len(model.blocks))]


class OfTenants(Model):
    """The block in slot n is of the tenant with the mark n % 3."""

    def pop_of(self, mark: int) -> int | None:
        free = [slot for slot in self.blocks if not self.readers.get(slot) and slot % 3 == mark]
        if not free:
            return None
        slot = min(free, key=self.blocks.__getitem__)
        self.level = max(self.level, self.blocks.pop(slot)[0])
        return slot

    def pop(self) -> int | None:
        level = self.level
        slot = super().pop()
        self.level = max(self.level, level)
        return slot


OWN_STEPS = st.tuples(
    st.sampled_from(["used", "hold", "release", "pop", "pop of", "used"]), st.integers(0, SLOTS - 1), st.integers(1, 9)
)


@given(st.lists(OWN_STEPS, max_size=80))
def test_so_do_blocks_of_several_tenants_of_whom_one_alone_may_have_to_yield(steps: list[tuple[str, int, int]]) -> None:
    blocks, model = GivingWay({}), OfTenants()
    for what, slot, asked in steps:
        here = slot in model.blocks
        if what == "pop":
            assert blocks.pop() == model.pop()
        elif what == "pop of":
            assert blocks.pop(slot % 3) == model.pop_of(slot % 3)
        elif what == "release":
            blocks.release(slot)
            model.release(slot)
        elif what == "hold" and here:
            blocks.hold(slot)
            model.readers[slot] = model.readers.get(slot, 0) + 1
        elif what == "used":
            if here:
                blocks.used(key(slot), asked)
            else:
                blocks.put(key(slot), slot, asked, slot % 3)
            model.set(slot, max(model.blocks[slot][0] if here else 0, model.level + asked))
    for mark in range(3):
        while (slot_of := model.pop_of(mark)) is not None:
            assert blocks.pop(mark) == slot_of
        assert blocks.pop(mark) is None
