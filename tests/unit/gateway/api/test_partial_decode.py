"""Large bodies mean what small ones do; what is not known of them is passed over."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gateway.api.body import check_body, decode_body
from gateway.api.partial_decode import NAMES, OTHERS, decode_partly
from gateway.errors import ApiError, UnsupportedParameter
from gateway.relay.engine_body import COPIED_BYTES_MAX, spliced_body
from gateway.token_ids import TokenIds
from tests.unit.gateway.api.test_body import ANY_ENDPOINT, JSON, PATIENT, statuses

OBJECTS = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), JSON, max_size=5)
CHANGES = {"cache_salt": "s", "kv_transfer_params": {"tag": 1}}
TRACED_BYTES_MAX = 1 << 20


def large(endpoint: Any, raw: bytes) -> tuple[int, Any]:
    return statuses(decode_partly, endpoint, raw)


def small(endpoint: Any, raw: bytes) -> dict[str, Any]:
    body = decode_body(raw)
    check_body(endpoint, body)
    return {name: value for name, value in body.items() if name in NAMES}


@PATIENT
@given(ANY_ENDPOINT, OBJECTS, st.booleans())
def test_of_a_large_body_the_same_fields_are_known_and_refused(endpoint: Any, body: dict[str, Any], escaped: bool) -> None:
    raw = json.dumps(body, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    assume(statuses(decode_body, raw)[0] == 200)
    status, fields = statuses(small, endpoint, raw)
    of_large, found = large(endpoint, raw)
    assert of_large == status
    if status == 200:
        known = dict(found[0])
        assert (OTHERS in known) == (not body.keys() <= set(NAMES))
        known.pop(OTHERS, None)
        assert known == fields


@PATIENT
@given(OBJECTS, JSON | st.just("a text"), st.sampled_from(["", " ", "\r\n\t "]), st.sampled_from([None, [], [1], [1, 2, 3]]))
def test_a_large_body_is_passed_on_but_for_its_prompt(
    body: dict[str, Any], prompt: Any, space: str, ids: list[int] | None
) -> None:
    raw = (space + json.dumps({**body, "prompt": prompt, "last": 1}) + space).encode()
    status, found = large("completions", raw)
    assume(status == 200)
    parts = spliced_body(raw, found[1], None if ids is None else TokenIds.of(ids)).parts(CHANGES)
    given = prompt if ids is None else ids
    assert json.loads(b"".join(parts)) == {**body, "prompt": given, "last": 1, **CHANGES}


def test_several_prompts_take_the_place_of_several_texts() -> None:
    raw = b'{"prompt": ["a", "b"], "n": 1}'
    _, span = decode_partly("completions", raw)
    parts = spliced_body(raw, span, [TokenIds.of([1]), TokenIds.of([2, 3])]).parts({})
    assert json.loads(b"".join(parts)) == {"prompt": [[1], [2, 3]], "n": 1}


def test_nothing_large_is_copied_and_nothing_small_keeps_the_rest() -> None:
    size = COPIED_BYTES_MAX
    raw = b'{"prompt":"x","k":"%b"}' % (b"k" * size)
    _, span = decode_partly("completions", raw)
    pieces = spliced_body(raw, span, TokenIds.of([1])).pieces
    kept = [piece for piece in pieces if isinstance(piece, memoryview)]
    assert [piece.obj for piece in kept] == [raw]
    assert json.loads(b"".join([*pieces, b"}"])) == {"prompt": [1], "k": "k" * size}
    small = spliced_body(b'{"prompt":"%b"}' % (b"x" * size), (10, size + 12), TokenIds.of([1])).pieces
    assert not [piece for piece in small if isinstance(piece, memoryview)]


@pytest.mark.parametrize("raw", [b"{}", b" { } ", b'{"n":1}'])
def test_an_object_is_gone_on_with_whatever_is_in_it(raw: bytes) -> None:
    assert json.loads(b"".join(spliced_body(raw, (0, 0), None).parts(CHANGES))) == {**json.loads(raw), **CHANGES}


def test_a_forbidden_field_is_known_however_it_is_written() -> None:
    for name in (b"cache_salt", rb"cache\u005fsalt", rb"\u0063ache_salt"):
        with pytest.raises(UnsupportedParameter):
            decode_partly("completions", b'{"prompt":"x","' + name + b'":"mine"}')


def test_of_a_field_that_occurs_twice_the_last_counts_and_is_replaced() -> None:
    raw = b'{"prompt":"first","prompt":"second"}'
    body, span = decode_partly("completions", raw)
    assert (body["prompt"], raw[slice(*span)]) == ("second", b'"second"')
    assert json.loads(b"".join(spliced_body(raw, span, TokenIds.of([7])).parts({}))) == {"prompt": [7]}


@pytest.mark.parametrize("raw", [b"", b"[]", b'"x"', b'{"prompt":"x"', b'{"prompt":"x","k":tru}', b'{"prompt":"\\ud83d"}'])
def test_what_is_no_object_is_the_clients_error(raw: bytes) -> None:
    with pytest.raises(ApiError) as error:
        decode_partly("completions", raw)
    assert error.value.status == 400


@pytest.mark.parametrize("values", [b'"k":[%b0]', b'%b"k":0'])
def test_what_is_passed_over_takes_no_memory(values: bytes) -> None:
    many = b'{"":0},' * 300_000 if b"[" in values else b"".join(b'"%d":0,' % number for number in range(200_000))
    raw = b'{"prompt":"x",' + values % many + b"}"
    tracemalloc.start()
    try:
        decode_partly("completions", raw)
        assert tracemalloc.get_traced_memory()[1] < TRACED_BYTES_MAX
    finally:
        tracemalloc.stop()
