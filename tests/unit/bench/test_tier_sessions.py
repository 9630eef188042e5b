"""The search of `bench.tiers sessions` for how many sessions are kept, and what it prints."""

from types import SimpleNamespace

import pytest

from bench.tiers import sessions
from bench.tiers.sessions import AGAIN_MAX, ARMS, Found, Sizes, Skipped, most_sessions, room


def replica_that_keeps(sessions: int, tried: list[int]):
    def share(count: int) -> float:
        tried.append(count)
        return 0.0 if count <= sessions else 0.5

    return share


def test_sessions_grow_in_number_until_too_much_is_computed_again():
    tried: list[int] = []
    assert most_sessions(replica_that_keeps(10, tried), 1) == (10, 13, 0.5)
    assert tried == [1, 2, 3, 4, 5, 6, 8, 10, 13]


@pytest.mark.parametrize("kept", range(1, 40))
def test_a_search_that_may_go_down_finds_two_numbers_that_were_tried_and_that_the_limit_is_between(kept):
    tried: list[int] = []
    found, more, share = most_sessions(replica_that_keeps(kept, tried), 20, down=True)
    assert found <= kept < more
    assert {found, more} <= set(tried)
    assert share > AGAIN_MAX


def test_a_search_that_may_not_go_down_says_that_it_began_too_high():
    with pytest.raises(RuntimeError, match="not even 20"):
        most_sessions(replica_that_keeps(3, []), 20)


def test_where_not_even_one_session_is_kept_none_is():
    assert most_sessions(replica_that_keeps(0, []), 4, down=True) == (0, 1, 0.5)


def test_a_row_has_what_was_found_or_why_nothing_was():
    assert Found("no tier", 8, 10, 0.214).row() == "| no tier | 8 | 10 | 21 % |"
    assert "does not code" in Found("host memory, rot4", skipped="it does not code by rot4").row()


def test_the_arms_that_code_host_memory_are_those_that_the_flags_say(tmp_path):
    for arm in ARMS:
        flags = arm.flags(1 << 20, tmp_path)
        lossy = flags[flags.index("--lossy") + 1] if "--lossy" in flags else ""
        assert arm.codec == ("" if arm.stores else lossy)


class Tables:
    """A replica of 100 blocks and its host memory of 300 slots, coded by `codec` if there is one."""

    def __init__(self, codec: str) -> None:
        coded = SimpleNamespace(codec=codec) if codec else None
        self._own = SimpleNamespace(num_blocks=100, block_size=16)
        self._below = SimpleNamespace(num_blocks=300, memories=(SimpleNamespace(coded=coded),))

    def tables(self) -> dict[str, SimpleNamespace]:
        return {"replica-0": self._own, "replica-0.host-memory": self._below}

    def close(self) -> None:
        pass


def test_room_is_counted_in_blocks_of_the_replica_and_slots_of_its_host_memory(monkeypatch):
    monkeypatch.setattr(sessions, "TableDirectory", lambda _: Tables("int8"))
    found = room(SimpleNamespace(table_dir=None), Sizes("", 1000, 0, 0), sessions._coded("int8"))
    assert found == 6


@pytest.mark.parametrize("codec", ["", "int8"])
def test_an_arm_whose_codec_host_memory_does_not_take_is_left_out(monkeypatch, codec):
    monkeypatch.setattr(sessions, "TableDirectory", lambda _: Tables(codec))
    with pytest.raises(Skipped, match="does not code by rot4"):
        room(SimpleNamespace(table_dir=None), Sizes("", 1000, 0, 0), sessions._coded("rot4"))
