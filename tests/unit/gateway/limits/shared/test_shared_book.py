"""One gateway's side of shared limits, beside a server that answers what it is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.frame_tiers.vault.resp import Reply, VaultError
from gateway.limits.book import Reservation
from gateway.limits.shared.shared_book import SharedBook, Verdict
from tests.unit.gateway.limits.limited_keys import limited
from tests.unit.gateway.limits.shared.test_commands import DONE


class Wire:
    """It answers everything so."""

    def __init__(self, answer: Reply) -> None:
        self.answer = answer

    def send(self, command: bytes, done: Callable[[Reply], None]) -> None:
        done(self.answer)


@pytest.mark.parametrize(
    ("answer", "ends_the_connection"),
    [(b"9" + DONE[1:], True), (b"nonsense", True), (DONE.replace(b" 40 ", b" -40 "), False), (DONE, False)],
)
def test_after_an_answer_that_cannot_be_used_the_gateway_decides_alone(answer: bytes, ends_the_connection: bool) -> None:
    whys: list[str] = []

    def failed(why: str) -> None:
        whys.append(why)
        book.lost()

    book, found = SharedBook("one", failed), list[Verdict]()
    book.connected(Wire(answer))
    book.reserve(Reservation(1, limited(requests_per_minute=1), 0, 0, 0.0), 0.0, found.append)
    assert found == [None if answer == DONE else "alone"]
    assert ("none of our script" in str(whys)) is ends_the_connection
    assert book.is_up is not ends_the_connection


def test_what_a_request_used_counts_from_its_end_on_and_not_from_what_was_told_before() -> None:
    book, key = SharedBook("one"), limited(tokens_per_minute=1000)
    book.connected(Wire(DONE))
    made = Reservation(1, key, 7, 0, 0.0)
    book.reserve(made, 10.0, lambda verdict: None)
    made.shared = "there"
    book.settle(made, 5, 60.0)

    def used(at: float) -> int:
        known = book.account(key.name, at)
        assert known is not None
        return known[0].state.tokens.total

    assert [used(at) for at in (60.0, 75.0, 119.0, 122.0)] == [14, 5, 5, 0]


@pytest.mark.parametrize("useless", [DONE.replace(b" 40 ", b" -40 "), VaultError("WRONGTYPE Operation against a key")])
def test_of_an_account_that_cannot_be_used_nothing_is_shown_that_was_told_before(useless: Reply) -> None:
    book, key, wire = SharedBook("one"), limited(tokens_per_day=1000), Wire(DONE)
    book.connected(wire)
    for answer, is_known in ((DONE, True), (useless, False), (DONE, True)):
        wire.answer = answer
        book.reserve(Reservation(1, key, 7, 0, 0.0), 10.0, lambda verdict: None)
        assert (book.account(key.name, 10.0) is not None) is is_known
