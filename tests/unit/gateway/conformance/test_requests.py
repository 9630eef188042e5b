"""Our server beside h11 and beside uvicorn's own: the same bytes are the same requests, or are refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from gateway.settings import Settings
from tests.unit.gateway.conformance.h11_reference import requests_by_h11
from tests.unit.gateway.conformance.known_differences import CLOSED_REQUESTS, REFUSED_REQUESTS, TAKEN_REQUESTS
from tests.unit.gateway.conformance.message import Stream, chunk
from tests.unit.gateway.conformance.request_oddities import HEAD_BYTES_MAX, ODDITIES, odd_stream
from tests.unit.gateway.conformance.request_streams import SENTINEL, message, requests_with_one_head, valid_stream
from tests.unit.gateway.conformance.request_verdict import Verdict, misread_answers
from tests.unit.gateway.conformance.servers import Heard, Server, our_server, uvicorn_server
from tests.unit.gateway.conformance.understood import End, Request, cut_target, pieces_of, some_pieces

VALID_CASES = 1500
ODD_CASES_EACH = 16
TWICE_ODD_CASES = 700
CUT_EVERYWHERE_CASES = 40
UVICORN_CASES = 400
HASTY_CASES = 400
ONE_HEAD_CASES = 600


@pytest.fixture
def ours(tmp_path: Path) -> Server:
    return our_server(Settings(run_dir=tmp_path, header_bytes_max=HEAD_BYTES_MAX))


async def test_a_valid_request_is_understood_as_h11_understands_it(ours: Server) -> None:
    source, verdict = random.Random(1), Verdict()
    for _ in range(VALID_CASES):
        stream = valid_stream(source)
        pieces = some_pieces(source, stream.data)
        reference = requests_by_h11(stream.data)
        assert reference.end is not End.REFUSED, stream
        verdict.judge(stream.oddities, reference, await ours.hear(pieces), pieces)
    assert verdict.objections == []


async def test_an_odd_request_is_understood_as_h11_understands_it_or_listed(ours: Server) -> None:
    source, verdict = random.Random(2), Verdict()
    for names in [[name] for name in ODDITIES for _ in range(ODD_CASES_EACH)] + [
        source.sample(list(ODDITIES), 2) for _ in range(TWICE_ODD_CASES)
    ]:
        stream = odd_stream(source, *names)
        pieces = some_pieces(source, stream.data)
        verdict.judge(stream.oddities, requests_by_h11(stream.data), await ours.hear(pieces), (names, pieces))
    assert verdict.objections == []
    listed = [("refused", REFUSED_REQUESTS), ("taken", TAKEN_REQUESTS), ("closed", CLOSED_REQUESTS)]
    assert verdict.used == {(kind, name) for kind, names in listed for name in names}


async def test_requests_with_one_head_are_understood_each_for_itself(ours: Server) -> None:
    source, verdict, kept = random.Random(9), Verdict(), 0
    for _ in range(ONE_HEAD_CASES):
        requests = [*requests_with_one_head(source), SENTINEL]
        pieces = [piece for each in requests for piece in ([each] if source.random() < 0.8 else some_pieces(source, each))]
        reference = requests_by_h11(b"".join(requests))
        kept += len(reference.whole)
        verdict.judge(frozenset(), reference, await ours.hear(pieces), pieces)
    assert verdict.objections == []
    assert kept > 2 * ONE_HEAD_CASES


async def test_a_request_is_understood_alike_wherever_it_is_cut(ours: Server) -> None:
    source = random.Random(3)
    for number in range(CUT_EVERYWHERE_CASES):
        stream = odd_stream(source, *source.sample(list(ODDITIES), number % 2))
        if len(stream.data) > 1000:
            continue
        whole = await ours.hear([stream.data])
        for cuts in [[at] for at in range(1, len(stream.data))] + [list(range(1, len(stream.data)))]:
            heard = await ours.hear(pieces_of(stream.data, cuts))
            assert heard.requests.end is whole.requests.end, (stream, cuts)
            if whole.requests.end is End.REFUSED:  # what comes together with what is refused is not answered
                assert heard.requests.whole[: len(whole.requests.whole)] == whole.requests.whole, (stream, cuts)
            else:
                assert heard == whole, (stream, cuts)


async def test_what_is_refused_was_no_request_wherever_it_is_cut(ours: Server) -> None:
    """No part of a refused message may come to the application as a whole request, however its bytes arrive."""
    source = random.Random(4)
    for name in ODDITIES:
        stream = odd_stream(source, name)
        if len(stream.data) > 1000:
            continue
        reference = requests_by_h11(stream.data)
        heard = await ours.hear(pieces_of(stream.data, list(range(1, len(stream.data)))))
        if heard.requests.end is End.REFUSED:
            assert heard.requests.whole == reference.whole[: len(heard.requests.whole)], stream


async def test_a_request_that_breaks_off_is_none(ours: Server) -> None:
    source = random.Random(5)
    for _ in range(30):
        data = message(source).sent()
        for length in range(1, len(data)):
            reference = requests_by_h11(data[:length])
            heard = await ours.hear([data[:length]])
            assert heard.requests == reference, data[:length]


async def test_an_answer_before_the_body_leaves_the_next_request_its_place(tmp_path: Path) -> None:
    source, verdict, hasty = random.Random(8), Verdict(), our_server(Settings(run_dir=tmp_path), reads=False)
    for _ in range(HASTY_CASES):
        stream = valid_stream(source)
        pieces, reference = some_pieces(source, stream.data), requests_by_h11(stream.data)
        without_bodies = tuple(request._replace(body=b"") for request in reference.whole)
        verdict.judge(frozenset(), reference._replace(whole=without_bodies), await hasty.hear(pieces), pieces)
    assert verdict.objections == []


async def test_many_requests_and_large_bodies_are_taken_as_they_are(ours: Server) -> None:
    source, verdict = random.Random(6), Verdict()
    body = source.randbytes(700_000)
    large = b"POST /large HTTP/1.1\r\nhost: x\r\n"
    streams = [b"".join(message(source).sent() for _ in range(40)) + SENTINEL for _ in range(5)]
    streams += [large + b"content-length: 700000\r\n\r\n" + body + SENTINEL]
    chunks = b"".join(chunk(body[start : start + 65_536]) for start in range(0, len(body), 65_536))
    streams += [large + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n" + SENTINEL]
    for stream in streams:
        for size in (1000, 65_536, len(stream)):
            heard = await ours.hear([stream[start : start + size] for start in range(0, len(stream), size)])
            verdict.judge(frozenset(), requests_by_h11(stream), heard, size)
    assert verdict.objections == []


@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_what_uvicorn_takes_as_well_it_understands_alike(ours: Server, http: str) -> None:
    source, theirs = random.Random(7), uvicorn_server(http)
    different = {"an upgrade", "a tunnel", "a trailer about the connection"}  # these it leaves to others, or obeys
    both = 0
    for number in range(UVICORN_CASES):
        names = [name for name in source.sample(list(ODDITIES), number % 2) if name not in different]
        stream = odd_stream(source, *names) if names else valid_stream(source)
        pieces = some_pieces(source, stream.data)
        wanted, heard = await ours.hear(pieces), await theirs.hear(pieces)
        for one, other in zip(wanted.requests.whole, heard.requests.whole, strict=False):
            both += 1
            assert one == as_ours(other, one), pieces
        if End.REFUSED not in (wanted.requests.end, heard.requests.end) and "the old name" not in names:
            assert len(wanted.requests.whole) == len(heard.requests.whole), pieces
    assert both > UVICORN_CASES


def as_ours(theirs: Request, ours: Request) -> Request:
    """A request of uvicorn's in our form: its path may be a URL, its values may end in spaces, and trailers be headers."""
    headers = [(name, value.rstrip(b" \t")) for name, value in theirs.headers[: len(ours.headers)]]
    path, query = cut_target(theirs.path + b"?" + theirs.query)
    return theirs._replace(path=path, query=query, headers=tuple(headers))


def test_a_verdict_sees_what_is_wrong() -> None:
    stream = Stream(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" + SENTINEL, frozenset())
    reference = requests_by_h11(stream.data)
    answers = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nanswer" * 2
    first, second = reference.whole
    wrong = [
        Heard(reference._replace(whole=(first._replace(body=b"x"), second)), answers),
        Heard(reference._replace(whole=(first,)), answers[: len(answers) // 2]),
        Heard(reference._replace(end=End.REFUSED), answers),
        Heard(reference._replace(end=End.CLOSED), answers),
        Heard(reference, answers[:-1]),
        Heard(reference, answers + b"HTTP/1.1 400 Rejected\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"),
        Heard(reference, answers.replace(b"content-length", b"connection: close\r\ncontent-length")),
    ]
    for heard in wrong:
        verdict = Verdict()
        verdict.judge(frozenset(), reference, heard, "")
        assert verdict.objections, heard
    right = Verdict()
    right.judge(frozenset(), reference, Heard(reference, answers), "")
    assert right.objections == []
    assert misread_answers(Heard(reference, answers)) == ""
