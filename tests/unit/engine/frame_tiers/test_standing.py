"""What is said of stores that are not in use: once when they go off, once when they are back."""

import pytest

from engine.frame_tiers.messages import TierStats
from engine.frame_tiers.standing import OPENING, SECONDS_SILENT_MAX, SECONDS_STARTING_MAX, Standing
from engine.frame_tiers.store import StoreStats

REFUSED = "off: failed its self-test: a block that was stored did not come back (gone: WRONGPASS invalid password)"


def heard(**states):
    return TierStats(tuple(StoreStats(name, state=state) for name, state in states.items()))


def test_a_store_that_goes_off_and_comes_back_is_one_line_each_and_a_warning_in_between():
    standing = Standing(("disk", "vault"), 0.0)
    assert standing.hear(heard(disk="ok", vault=OPENING), 0.0) == []
    assert standing.warnings() == []
    (line,) = standing.hear(heard(disk="ok", vault=REFUSED), 1.0)
    assert line.startswith(f"the vault is {REFUSED}. ")
    assert "--vault-password-file" in line
    assert standing.warnings() == [line]
    assert standing.hear(heard(disk="ok", vault="off: another reason"), 2.0) == []
    assert "another reason" in standing.warnings()[0]
    assert standing.hear(heard(disk="ok", vault="ok"), 3.0) == ["the vault is in use again"]
    assert standing.warnings() == []
    assert standing.hear(heard(disk="ok", vault="ok"), 4.0) == []


def test_a_full_disk_is_said_to_be_read_only():
    standing = Standing((), 0.0)
    assert standing.hear(heard(disk="read-only: /d is full"), 0.0)[0].startswith("the disk is read-only: /d is full. Give")


@pytest.mark.parametrize("spoke", [False, True])
def test_a_process_that_stays_silent_is_said_once_after_a_while(spoke):
    standing, quiet = Standing(("vault",), 0.0), SECONDS_STARTING_MAX
    if spoke:
        quiet = SECONDS_SILENT_MAX
        standing.hear(heard(vault="ok"), 0.0)
    assert standing.hear(None, quiet - 1) == []
    (line,) = standing.hear(None, quiet)
    assert "its process does not answer" in line
    assert standing.hear(None, quiet + 1) == []
    assert standing.hear(heard(vault=OPENING), quiet + 2) == []
    assert standing.warnings() == [line]
    assert standing.hear(heard(vault="ok"), quiet + 3) == ["the vault is in use again"]


def test_without_stores_nothing_is_missed():
    standing = Standing((), 0.0)
    assert standing.hear(None, 1000.0) == []
    assert standing.warnings() == []
