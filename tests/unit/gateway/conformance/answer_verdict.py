"""Whether our client understood an answer as it should. Pure."""

from __future__ import annotations

from gateway.upstream.answer_head import AnswerHead
from tests.unit.gateway.conformance.client import Got
from tests.unit.gateway.conformance.known_differences import OTHERWISE_REUSED, REFUSED_ANSWERS, TAKEN_ANSWERS
from tests.unit.gateway.conformance.understood import Answer


class AnswerVerdict:
    """Collects what differs: `objections` to what must not, and the `used` names of what may."""

    def __init__(self) -> None:
        self.objections: list[str] = []
        self.used: set[tuple[str, str]] = set()

    def judge(self, names: frozenset[str], reference: Answer | str, got: Got | str, case: object) -> None:
        """Compare what we made of an answer that has these oddities with what h11 made of it."""
        difference = _difference(reference, got)
        allowed = {"refused": REFUSED_ANSWERS, "taken": TAKEN_ANSWERS, "reused": OTHERWISE_REUSED}
        known = names & allowed.get(difference, {}).keys()
        if known:
            self.used |= {(difference, name) for name in known if len(names) == 1}
        elif difference:
            self.objections.append(f"{difference}: {case}\n h11: {reference}\nours: {got}")


def _difference(reference: Answer | str, got: Got | str) -> str:
    """What differs, in a word; "" if nothing does."""
    if isinstance(got, str):
        return "" if isinstance(reference, str) else "refused"
    if isinstance(reference, str):
        return "taken"
    lines = AnswerHead(reference.status, list(reference.headers)).lines
    if (got.status, got.lines, got.body) != (reference.status, lines, reference.body):
        return "understood otherwise"
    return "" if got.reusable == reference.reusable else "reused"
