"""Our client beside h11's: the same bytes are the same answer, or an error, and never another body."""

from __future__ import annotations

import random

import pytest

from tests.unit.gateway.conformance.answer_oddities import ANSWER_ODDITIES, odd_answer
from tests.unit.gateway.conformance.answer_streams import answer, answer_without_end, answers_with_one_head, valid_answer
from tests.unit.gateway.conformance.answer_verdict import AnswerVerdict
from tests.unit.gateway.conformance.client import Client, Got
from tests.unit.gateway.conformance.h11_reference import answer_by_h11
from tests.unit.gateway.conformance.known_differences import OTHERWISE_REUSED, REFUSED_ANSWERS, TAKEN_ANSWERS
from tests.unit.gateway.conformance.understood import BROKEN, Answer, pieces_of, some_pieces

CONNECTIONS = 800
ODD_CASES_EACH = 24
TWICE_ODD_CASES = 1500
CUT_EVERYWHERE_CASES = 40
BROKEN_OFF_CASES = 40
pumped = pytest.mark.parametrize("pumps", [False, True], ids=["read", "pumped"])


@pumped
async def test_valid_answers_are_understood_as_h11_understands_them(pumps: bool) -> None:
    source, verdict, lengths = random.Random(11), AnswerVerdict(), set()
    for _ in range(CONNECTIONS):
        client = Client(pumps=pumps)
        for number in range(source.randint(1, 6)):
            stream = valid_answer(source)
            pieces = some_pieces(source, stream)
            reference, rest = answer_by_h11(stream, ends=False)
            assert isinstance(reference, Answer), stream
            assert rest == b""
            got = await client.ask(pieces, ends=False)
            verdict.judge(frozenset(), reference, got, pieces)
            lengths.add(number)
            if not reference.reusable:
                break
    assert verdict.objections == []
    assert lengths == set(range(6))


@pumped
async def test_an_answer_to_the_end_of_the_connection_is_all_of_it(pumps: bool) -> None:
    source, verdict = random.Random(12), AnswerVerdict()
    for number in range(400):
        stream = answer_without_end(source) if number % 2 else valid_answer(source)
        pieces = some_pieces(source, stream)
        reference, _ = answer_by_h11(stream, ends=True)
        assert isinstance(reference, Answer), stream
        verdict.judge(frozenset(), reference, await Client(pumps=pumps).ask(pieces, ends=True), pieces)
        if number % 2:
            assert await Client(pumps=pumps).ask(pieces, ends=False) == BROKEN, pieces  # the connection is reset
    assert verdict.objections == []


@pumped
async def test_answers_with_one_head_are_understood_each_for_itself(pumps: bool) -> None:
    source, verdict, lengths = random.Random(16), AnswerVerdict(), set()
    for _ in range(CONNECTIONS):
        client = Client(pumps=pumps)
        for number, stream in enumerate(answers_with_one_head(source)):
            pieces = [stream] if source.random() < 0.8 else some_pieces(source, stream)
            reference, rest = answer_by_h11(stream, ends=False)
            names = frozenset(["bytes behind it"] if rest else ["a length with zeros"] if b"-length: 0" in stream else [])
            got = await client.ask(pieces, ends=False)
            verdict.judge(names, reference, got, pieces)
            lengths.add(number)
            if isinstance(got, str) or not got.reusable:
                break
    assert verdict.objections == []
    assert lengths == set(range(6))


@pumped
async def test_an_odd_answer_is_understood_as_h11_understands_it_or_listed(pumps: bool) -> None:
    source, verdict = random.Random(13), AnswerVerdict()
    for names in [[name] for name in ANSWER_ODDITIES for _ in range(ODD_CASES_EACH)] + [
        source.sample(list(ANSWER_ODDITIES), 2) for _ in range(TWICE_ODD_CASES)
    ]:
        stream = odd_answer(source, *names)
        pieces, ends = some_pieces(source, stream.data), source.random() < 0.3
        reference, _ = answer_by_h11(stream.data, ends=ends)
        got = await Client(pumps=pumps).ask(pieces, ends=ends)
        verdict.judge(stream.oddities, reference, got, (names, ends, pieces))
    assert verdict.objections == []
    listed = [("refused", REFUSED_ANSWERS), ("taken", TAKEN_ANSWERS), ("reused", OTHERWISE_REUSED)]
    assert verdict.used == {(kind, name) for kind, names in listed for name in names}


@pumped
async def test_an_answer_is_understood_alike_wherever_it_is_cut(pumps: bool) -> None:
    source = random.Random(14)
    for _ in range(CUT_EVERYWHERE_CASES):
        stream = answer(source).sent()
        whole = await Client(pumps=pumps).ask([stream], ends=False)
        assert isinstance(whole, Got)
        for cuts in [[at] for at in range(1, len(stream))] + [list(range(1, len(stream)))]:
            assert await Client(pumps=pumps).ask(pieces_of(stream, cuts), ends=False) == whole, (stream, cuts)


async def test_an_answer_that_breaks_off_is_an_error() -> None:
    source, verdict = random.Random(15), AnswerVerdict()
    for number in range(BROKEN_OFF_CASES):
        stream = answer(source).sent()
        for length in range(len(stream)):
            client = Client(pumps=number % 2 == 0)
            if length % 2:
                reference, _ = answer_by_h11(stream[:length], ends=True)
                verdict.judge(frozenset(), reference, await client.ask([stream[:length]], ends=True), stream[:length])
            else:
                assert await client.ask([stream[:length]], ends=False) == BROKEN, stream[:length]
    assert verdict.objections == []


def test_a_verdict_sees_what_is_wrong() -> None:
    reference = Answer(200, ((b"x-a", b"b"),), b"hello", True)
    right = Got(200, b"x-a: b\r\n", b"hello", True)
    wrong = [
        right._replace(status=201),
        right._replace(lines=b""),
        right._replace(body=b"hell"),
        right._replace(reusable=False),
        BROKEN,
    ]
    for got, wanted in [*((each, reference) for each in wrong), (right, BROKEN), (right, reference._replace(reusable=False))]:
        verdict = AnswerVerdict()
        verdict.judge(frozenset(), wanted, got, "")
        assert verdict.objections, got
    verdict = AnswerVerdict()
    verdict.judge(frozenset(), reference, right, "")
    verdict.judge(frozenset(), BROKEN, BROKEN, "")
    assert verdict.objections == []
