"""Which requests a table lists as waiting: what had begun when its engine ended may be what ended it."""

from contextlib import closing

import pytest

from tests.unit.engine.connector.scheduler_fixtures import PROMPT, Replica, Request, import_all
from transport.table.waiting_area import SLOTS


@pytest.fixture
def pair(tmp_path):
    a, b = (Replica(tmp_path, f"replica-{i}") for i in range(2))
    with closing(a.half), closing(b.half):
        yield a, b


def hinted(name="s", **hint):
    return Request(name, list(PROMPT), kv_transfer_params={"peerkv": {"tag": 77} | hint})


def test_a_request_is_listed_as_waiting_until_it_is_given_a_step(pair):
    a, _ = pair
    request = hinted("r", source="")
    assert not a.reader.waits(77)
    a.half.arrived(request)
    a.half.match(request, 0)
    assert a.reader.waits(77)
    assert not a.reader.waits(0)
    a.schedule(new=[(request, [5, 6, 7, 8], 0, 14)])
    assert not a.reader.waits(77)


def test_a_request_whose_import_begins_waits_no_longer(pair):
    a, b = pair
    a.prefill(Request("r", list(PROMPT)), [5, 6, 7, 8])
    b.half.arrived(hinted())
    assert b.reader.waits(77)
    import_all(b, hinted(), [5, 6, 7, 8])
    assert not b.reader.waits(77)


def test_a_request_that_ends_while_it_waits_is_listed_no_longer(pair):
    a, _ = pair
    a.half.arrived(hinted("r"))
    a.half.finished("r", aborted=True)
    assert not a.reader.waits(77)


def test_choices_of_a_request_are_listed_as_one_and_never_after_one_of_them_began(pair):
    a, _ = pair
    first, second, third = (hinted(name, source="") for name in ("0_r", "1_r", "2_r"))
    a.half.arrived(first)
    a.half.arrived(second)
    assert a.reader.waits(77)
    a.schedule(new=[(first, [5, 6, 7, 8], 0, 14)])
    a.half.arrived(third)
    assert not a.reader.waits(77)


def test_more_requests_than_there_is_room_for_are_not_listed_and_room_comes_back(pair):
    a, _ = pair
    tags = range(1, SLOTS + 2)
    for tag in tags:
        a.half.arrived(hinted(f"r{tag}", tag=tag))
    assert [tag for tag in tags if not a.reader.waits(tag)] == [SLOTS + 1]
    a.half.finished("r1")
    a.half.arrived(hinted("later", tag=9999))
    assert (a.reader.waits(1), a.reader.waits(9999)) == (False, True)
