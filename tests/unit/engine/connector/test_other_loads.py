"""Loads of other connectors, for models with one KV cache group and with several."""

from types import SimpleNamespace

from engine.connector.other_loads import OtherLoads
from engine.connector.vllm_groups import ModelGroups
from transport.groups import Group

PLAIN = ModelGroups((Group("full", 4),))
MIXED = ModelGroups((Group("full", 4), Group("window", 4, 8), Group("state", 8)), places=(1, 0, 2))


def given(*block_ids):
    return SimpleNamespace(get_block_ids=lambda: tuple(map(list, block_ids)))


def test_a_request_without_a_place_in_the_step_is_loaded_behind_what_was_found():
    loads = OtherLoads(PLAIN)
    for name in ("waits", "runs"):
        loads.found(name, 8)
        loads.admitted(name, given([5, 6, 7, 9]))
    assert loads.begun({"runs": 3}) == [[7, 9]]
    assert loads.begun({}) == []
    assert loads.under_way == {"waits": [7, 9]}
    loads.ended(["waits"])
    assert not loads.under_way


def test_a_request_whose_step_begins_behind_what_was_found_is_loaded_with_it():
    loads = OtherLoads(PLAIN)
    loads.found("r", 4)
    assert loads.loaded("r", [[5, 6, 7, 8]], 10) == [6, 7]
    assert loads.loaded("r", [[5, 6, 7, 8]], 10) == []  # as after a load that was told of already
    loads.found("r", 8)
    assert loads.loaded("r", [[5, 6, 7, 8]], 9) == []  # the step begins within a block that it copied


def test_what_our_own_import_fills_is_nobody_elses():
    loads = OtherLoads(PLAIN)
    loads.found("r", 4)
    loads.ours("r")
    assert loads.loaded("r", [[5, 6, 7, 8]], 12) == []


def test_of_groups_that_do_not_need_all_blocks_those_before_the_found_ones_count_too():
    loads = OtherLoads(MIXED)
    loads.found("r", 8)
    loads.admitted("r", given([0, 0, 13, 14], [21, 22, 23, 24], [0, 32]))
    assert loads.begun({}) == [[23, 24, 13, 14, 32]]
    loads.found("q", 8)
    assert loads.loaded("q", [[21, 22, 23, 24], [0, 12, 13, 14], [31, 32]], 12) == [23, 12, 13, 31, 32]


def test_what_lies_behind_a_block_that_failed_is_spoilt_but_not_what_no_step_has_used():
    loads = OtherLoads(PLAIN)
    loads.admitted("waits", given([7, 9]))
    loads.begun({})
    assert loads.spoilt({9, 5, 3}, [[[1, 2, 3, 4]], [[2, 6]], [[7, 9]]]) == {3, 4, 5}
    assert loads.spoilt({9}, [[[1, 9]]]) == set()


def test_of_a_request_that_ended_nothing_is_remembered():
    loads = OtherLoads(PLAIN)
    loads.found("r", 4)
    loads.admitted("r", given([5, 6]))
    loads.forget("r")
    assert loads.begun({}) == []
    assert loads.loaded("r", [[5, 6]], 8) == []
