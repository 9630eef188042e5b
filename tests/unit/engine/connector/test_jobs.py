"""A worker's jobs: a request that imports from several sources is told of once, when nothing of it is under way any more."""

from dataclasses import replace

import numpy as np
import pytest

from engine.connector.jobs import TWICE, Jobs
from engine.connector.step_messages import ImportReport
from transport.backends.base import ImportJob

GOOD = ImportReport(frozenset(), 0, 100, 10, "")


def job(number=0, name="r", blocks=2):
    """A job of so many blocks, the targets of number n being 10 n and the next ones."""
    targets = np.arange(10 * number, 10 * number + blocks, dtype=np.int32)
    return ImportJob(name, f"source-{number}", 1, targets, np.zeros(blocks, np.uint64), targets, (), number)


def failed(*blocks):
    return ImportReport(frozenset(blocks), len(blocks), 100, 10, "changed")


@pytest.fixture
def three():
    """A request with three jobs under way."""
    jobs = Jobs()
    jobs.begin([job(0), job(1), job(2)])
    return jobs


def test_a_request_with_one_job_ends_with_it():
    jobs = Jobs()
    jobs.begin([job(), job(name="s")])
    assert jobs.end(job(), GOOD) is GOOD
    assert [each.id for each in jobs.under_way()] == [("s", 0)]


def test_a_request_with_several_jobs_ends_with_the_last_of_them_and_its_reports_are_in_order(three):
    assert three.end(job(2), failed(21)) is None
    assert [each.id for each in three.under_way()] == [("r", 0), ("r", 1)]
    assert three.end(job(0), GOOD) is None
    second = failed(10, 11)
    found = three.end(job(1), second)
    assert [each.failed_blocks for each in found.by_source()] == [frozenset(), {10, 11}, {21}]
    assert found.by_source()[1] == second
    assert three.under_way() == []
    three.begin([job(0)])  # as a request of the same name later
    assert three.end(job(0), GOOD) is GOOD


def test_the_leading_blocks_that_are_good_are_those_of_whole_jobs_and_of_the_first_that_goes_on(three):
    assert three.checked({}) == {}
    assert three.checked({("r", 1): 1}) == {}  # what is before it may still fail
    assert three.checked({("r", 0): 1, ("r", 1): 1}) == {"r": 1}
    three.end(job(0), GOOD)
    assert three.checked({}) == {"r": 2}
    assert three.checked({("r", 1): 1, ("r", 2): 2}) == {"r": 3}
    three.end(job(2), GOOD)
    assert three.checked({("r", 1): 1}) == {"r": 3}
    three.end(job(1), GOOD)
    assert three.checked({}) == {}  # it has ended


def test_behind_a_job_that_failed_nothing_counts(three):
    three.end(job(0), GOOD)
    three.end(job(1), failed(11))
    assert three.checked({("r", 2): 2}) == {"r": 2}


def test_a_request_of_one_job_counts_as_its_copy_says():
    jobs = Jobs()
    jobs.begin([job(), job(name="s")])
    assert jobs.checked({("r", 0): 1}) == {"r": 1}


def test_a_second_job_of_the_same_number_does_not_begin_and_its_blocks_fail_with_the_first():
    jobs, newer = Jobs(), replace(job(), target_blocks=np.array([7, 8], np.int32))
    first = job()
    assert jobs.begin([first]) == [first]
    assert jobs.begin([newer]) == []
    assert jobs.under_way() == [first]
    assert jobs.checked({first.id: 2}) == {}  # of which of the two is not known
    assert jobs.end(first, GOOD) == replace(GOOD, failed_blocks=frozenset({7, 8}), reason=TWICE)
    assert jobs.begin([newer]) == [newer]
    assert jobs.end(newer, GOOD) is GOOD


def test_a_second_job_of_a_number_is_told_of_with_the_last_of_several_sources(three):
    assert three.begin([replace(job(1), target_blocks=np.array([99], np.int32))]) == []
    assert three.end(job(1), failed(10)) is None
    assert three.begin([replace(job(1), target_blocks=np.array([98], np.int32))]) == []  # that has ended, the request has not
    assert three.end(job(0), GOOD) is None
    found = three.end(job(2), GOOD)
    assert [each.failed_blocks for each in found.by_source()] == [{98, 99}, {10}, frozenset()]
    assert three.under_way() == []


def test_reports_of_several_ranks_are_merged_source_by_source():
    one, other = replace(GOOD, further=(GOOD, failed(20))), replace(failed(0), further=(failed(10), GOOD))
    for merged in (one.merged(other), other.merged(one)):
        assert [each.failed_blocks for each in merged.by_source()] == [{0}, {10}, {20}]
        assert [each.bytes for each in merged.by_source()] == [200] * 3
