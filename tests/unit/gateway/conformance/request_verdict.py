"""Whether a server understood a client's stream as it should. Pure."""

from __future__ import annotations

from tests.unit.gateway.conformance.h11_reference import answer_by_h11
from tests.unit.gateway.conformance.known_differences import CLOSED_REQUESTS, REFUSED_REQUESTS, TAKEN_REQUESTS
from tests.unit.gateway.conformance.servers import Heard
from tests.unit.gateway.conformance.understood import BROKEN, Answer, End, Request, Requests

_REFUSALS = frozenset({400, 431, 501, 505})
_OF_AN_UPGRADE = (b"connection", b"upgrade")


class Verdict:
    """Collects what differs: `objections` to what must not, and the `used` names of what may."""

    def __init__(self) -> None:
        self.objections: list[str] = []
        self.used: set[tuple[str, str]] = set()

    def judge(self, names: frozenset[str], reference: Requests, heard: Heard, case: object) -> None:
        """Compare what was heard of a stream that has these oddities with what h11 made of it."""
        ours = heard.requests
        if "an upgrade" in names:
            ours, reference = (_without_upgrade(each) for each in (ours, reference))
        difference = _difference(ours, reference)
        allowed: dict[str, dict[str, str]] = {"refused": REFUSED_REQUESTS, "taken": TAKEN_REQUESTS, "closed": CLOSED_REQUESTS}
        known = names & allowed.get(difference, {}).keys()
        if known:
            self.used |= {(difference, name) for name in known if len(names) == 1}
        elif difference:
            self.objections.append(f"{difference}: {case}\n h11: {reference}\nours: {ours}")
        if misread := misread_answers(heard):
            self.objections.append(f"{misread}: {case}\nwritten: {heard.written!r}")


def _difference(ours: Requests, reference: Requests) -> str:
    """What differs, in a word; "" if nothing does, or both refuse the stream and ours sooner, with answers lost."""
    shared = min(len(ours.whole), len(reference.whole))
    if ours.whole[:shared] != reference.whole[:shared]:
        return "understood otherwise"
    if ours.end is End.REFUSED and reference.end is End.REFUSED:
        return "" if len(ours.whole) <= len(reference.whole) else "taken"
    if ours.end is End.REFUSED:
        return "refused"
    if reference.end is End.REFUSED:
        return "taken"
    if ours == reference:
        return ""
    return "closed" if ours.end is End.CLOSED and len(ours.whole) <= len(reference.whole) else "understood otherwise"


def _without_upgrade(requests: Requests) -> Requests:
    def without(request: Request) -> Request:
        return request._replace(headers=tuple(header for header in request.headers if header[0] not in _OF_AN_UPGRADE))

    return Requests(tuple(map(without, requests.whole)), requests.end)


def misread_answers(heard: Heard) -> str:
    """What a client that is h11 has against the answers; "" for nothing."""
    rest, (whole, end) = heard.written, heard.requests
    for number, request in enumerate(whole):
        is_last = number == len(whole) - 1
        ends = is_last and end is End.CLOSED
        answer, rest = answer_by_h11(rest, ends=ends, method=request.method)
        if not isinstance(answer, Answer) or (answer.status, answer.body) != (200, _body_for(request)):
            return f"answer {number} is {answer}"
        headers = dict(answer.headers)
        if ends and headers.get(b"connection") != b"close":
            return f"answer {number} does not say that it is the last"
        if not ends and b"connection" in headers and end is not End.REFUSED:
            return f"answer {number} says that it is the last"
        if request.version == b"1.0" and b"transfer-encoding" in headers:
            return f"answer {number} is in chunks"
    return _misread_end(rest, end)


def _misread_end(rest: bytes, end: End) -> str:
    if not rest:
        return ""
    answer, more = answer_by_h11(rest, ends=True, method=b"GET")
    if answer is BROKEN or isinstance(answer, str) or more:
        return f"the end is {answer}"
    closes = dict(answer.headers).get(b"connection") == b"close"
    return "" if closes and end is End.REFUSED and answer.status in _REFUSALS else f"the end is {answer}"


def _body_for(request: Request) -> bytes:
    return b"" if request.method == b"HEAD" else b"answer"
