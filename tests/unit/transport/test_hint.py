"""The gateway's hint: every field is optional, and one that is not what it should be counts as absent."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.hint import PIN_SECONDS_MAX, UNPIN_MAX, Hint, PinWish, read_hint, write_hint


def test_every_field_is_read():
    hint = {"source": "a", "tag": 2**63 - 1, "tokens": 512, "pin": {"id": 9, "seconds": 1.5}, "unpin": [1, 2], "store": [7]}
    assert read_hint({"peerkv": hint}) == Hint("a", 2**63 - 1, 512, PinWish(9, 1.5), (1, 2), (7,))


@pytest.mark.parametrize(
    "hint", [Hint(), Hint("", 3), Hint("a", 2**63 - 1, 512, PinWish(9, 1.5)), Hint(tag=1, unpin=(1, 2)), Hint(store=(1, 2))]
)
def test_what_is_written_is_read(hint):
    assert read_hint(msgspec.json.decode(msgspec.json.encode(write_hint(hint)))) == hint


def test_what_says_nothing_is_not_written():
    assert write_hint(Hint(tag=7)) == {"peerkv": {"tag": 7}}
    assert write_hint(Hint("", 7)) == {"peerkv": {"source": "", "tag": 7}}


@pytest.mark.parametrize("params", [None, {}, [], 7, {"other": 1}, {"peerkv": {}}, {"peerkv": {"of a later version": 1}}])
def test_without_a_hint_nothing_is_asked_and_nothing_is_malformed(params):
    assert read_hint(params) == Hint()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", 7),
        ("source", None),
        ("tag", -1),
        ("tag", 2**63),
        ("tag", True),
        ("tag", "1"),
        ("tokens", 1.0),
        ("tokens", -1),
        ("pin", {"id": 1}),
        ("pin", {"seconds": 1}),
        ("pin", {"id": 1, "seconds": 0}),
        ("pin", {"id": 1, "seconds": float("nan")}),
        ("pin", {"id": 1, "seconds": 10**400}),
        ("pin", {"id": 1, "seconds": PIN_SECONDS_MAX + 1}),
        ("pin", {"id": 1, "seconds": True}),
        ("pin", 3),
        ("unpin", 3),
        ("unpin", [1, "2"]),
        ("unpin", [1] * (UNPIN_MAX + 1)),
    ],
)
def test_a_malformed_field_is_ignored_and_the_others_hold(field, value):
    whole = {"source": "a", "tag": 5, "tokens": 8, "pin": {"id": 1, "seconds": 2}, "unpin": [3]}
    without = {name: part for name, part in whole.items() if name != field}
    found, expected = read_hint({"peerkv": whole | {field: value}}), read_hint({"peerkv": without})
    assert (expected.malformed, found.malformed) == (0, 1)
    assert {name: getattr(found, name) for name in whole} == {name: getattr(expected, name) for name in whole}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "replica-0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "seconds", "x"]), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["source", "tag", "tokens", "pin", "unpin"]), JSON))
def test_no_hint_raises(given_hint):
    hint = read_hint({"peerkv": given_hint})
    assert 0 <= hint.malformed <= len(given_hint)
    assert 0 <= hint.tag < 2**63
