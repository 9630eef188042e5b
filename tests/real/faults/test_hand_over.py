"""A replica drained by `peerkv replicas drain`: what it alone held is a hit elsewhere from then on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.real.fleet import ANSWER_SECONDS_MAX, REPLICAS, ROOT, Fleet
from tests.real.prompts import Words

LENGTH = 400
WHOLE = (LENGTH - 1) // 32 * 32
REQUESTS = 4
DRAINED, OTHER = REPLICAS


def replicas(fleet: Fleet, verb: str) -> str:
    """What the command says of the replica that is drained here; it has to succeed."""
    command = [sys.executable, "-m", "gateway.cli", "replicas", verb, DRAINED, "--url", fleet.url]
    return subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=ANSWER_SECONDS_MAX, check=True
    ).stdout


@pytest.fixture
def emptied(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet with empty caches; both replicas serve again afterwards."""
    fleet.flush()
    yield fleet
    replicas(fleet, "resume")


def test_the_hottest_prefixes_of_a_drained_replica_are_imported_by_another_before_anybody_asks(
    emptied: Fleet, words: Words
) -> None:
    hot, known = words.text(LENGTH), words.text(LENGTH)
    cold, *_ = [emptied.answer(hot, replica=DRAINED) for _ in range(REQUESTS)]
    for replica in REPLICAS:
        emptied.answer(known, replica=replica)
    with emptied.counting(OTHER) as moved:
        said = replicas(emptied, "drain")
    assert f"{DRAINED} is draining; {WHOLE} tokens of its prefixes were handed over" in said
    assert (moved.peer, moved.local) == (WHOLE, 0)
    with emptied.counting(OTHER) as counted:
        answer = emptied.answer(hot)
    assert (answer.replica, answer.cached_tokens) == (OTHER, WHOLE)
    assert (counted.local, counted.peer, counted.computed) == (WHOLE, 0, LENGTH - WHOLE)
    assert answer.close_to(cold)
