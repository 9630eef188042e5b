"""What an answer of the server means, and that whatever is none of our script's is taken for nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.frame_tiers.vault.resp import Reply, VaultError
from gateway.limits.budgets import month_of
from gateway.limits.shared.commands import FIGURES, AccountUnusable, AnswerRefused, understood

DAY = 20_000
NOW = DAY * 86400 + 100
MONTH = month_of(NOW)[0]
HEAD = f"{NOW}000 1 7 3 {NOW} 9 {NOW - 2} {DAY} 40 {MONTH} 50"
DONE, REPLACED = f"0 {HEAD}".encode(), f"2 {HEAD}".encode()
SHORT = f"1 {HEAD}|{NOW - 5} 2 {NOW} 1|{NOW - 2} 9".encode()


def test_an_account_is_told_with_or_without_its_seconds() -> None:
    done, short = understood(DONE), understood(SHORT)
    assert done is not None
    assert short is not None
    assert (done.short, done.account.state.requests.slots) == (False, {NOW: 3})
    assert (short.short, short.account.state.requests.slots) == (True, {NOW - 5: 2, NOW: 1})
    for told in (done, short):
        state = told.account.state
        assert (told.now, told.account.running, told.account.held_tokens) == (NOW, 1, 7)
        assert (state.tokens.total, state.day.spent, state.month.spent) == (9, 40, 50)
    assert understood(REPLACED) is None


@pytest.mark.parametrize(
    "reply",
    [
        *(None, 1, [DONE], b"", b"OK", VaultError("OOM command not allowed"), VaultError("NOSCRIPT No matching script")),
        *(b"3" + DONE[1:], b"-1" + DONE[2:], b"7" + DONE[1:]),
        *(DONE + b" 1", DONE.rpartition(b" ")[0], DONE.replace(b" 40 ", b" 4_0 "), DONE.replace(b" 40 ", b" +40 ")),
        *(DONE.replace(b" 40 ", b" %s " % (b"4" * 5000)), DONE.replace(b" 40 ", b" 4e1 ")),
        *(DONE + b"|", DONE + b"|1 2|3 4", REPLACED + b"|1 2|3 4", b"1" + DONE[1:], SHORT + b"|", SHORT + b" 5"),
    ],
)
def test_what_is_no_answer_of_our_script_is_refused(reply: Reply) -> None:
    with pytest.raises(AnswerRefused):
        understood(reply)


@pytest.mark.parametrize(
    "reply",
    [
        *(VaultError("WRONGTYPE Operation against a key"), VaultError("ERR user_script:12: attempt to compare nil")),
        *(DONE.replace(b" 40 ", b" -40 "), DONE.replace(b" 20000 ", b" 19999 "), DONE.replace(b" 20000 ", b" 20002 ")),
        *(DONE.replace(b" %d " % MONTH, b" %d " % (MONTH + 2)), DONE.replace(b" %d " % MONTH, b" 99999999 ")),
        *(DONE.replace(b"000 1 7", b"000000000000 1 7"), DONE.replace(b" %d 9" % NOW, b" %d 9" % (NOW + 1))),
        *(SHORT.replace(b" 2 %d 1|" % NOW, b" 2 %d 2|" % NOW), SHORT.replace(b" 3 %d 9 " % NOW, b" 4 %d 9 " % NOW)),
        b"1 %b|%d 1 %d 2|%d 9" % (HEAD.encode(), NOW, NOW - 5, NOW - 2),
        b"1 %b|%d 1 %d 2|%d 9" % (HEAD.encode(), NOW, NOW, NOW - 2),
    ],
)
def test_an_account_that_cannot_be_is_no_valid_one(reply: Reply) -> None:
    with pytest.raises(AccountUnusable):
        understood(reply)


@given(st.one_of(st.binary(), st.lists(st.integers(-1, 1 << 70), min_size=FIGURES, max_size=FIGURES)))
def test_whatever_the_server_answers_is_understood_or_refused(answer: bytes | list[int]) -> None:
    try:
        told = understood(answer if isinstance(answer, bytes) else b" ".join(b"%d" % number for number in answer))
    except (AnswerRefused, AccountUnusable):
        return
    assert told is None or told.now >= 0
