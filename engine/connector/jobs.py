"""The import jobs that a worker has under way: a request's import has ended when all its jobs have."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from engine.connector.step_messages import ImportReport
from transport.backends.base import ImportJob, JobId

TWICE = "the request had the same import under way already"


class Jobs:
    """By request; those of a request begin together, one for each source, in the order of the prompt.

    Until the last of them has ended nothing is told of a request's import but how much of it is good: vLLM would give its
    blocks away, and the rest may still be written.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, list[ImportJob]] = {}
        self._reports: dict[str, dict[int, ImportReport]] = {}
        """Of requests of whose jobs some have ended, but not all."""
        self._refused: dict[str, set[int]] = {}
        """The target blocks of jobs that do not begin, by request."""

    def begin(self, jobs: Iterable[ImportJob]) -> list[ImportJob]:
        """Return those of these jobs that are to begin now: all, unless the request has one of that number under way. Then the
        blocks of the newer one fail, and are told of with the others."""
        fresh = []
        for job in jobs:
            own = self._jobs.setdefault(job.request_id, [])
            if any(each.number == job.number for each in own):
                self._refused.setdefault(job.request_id, set()).update(job.target_blocks.tolist())
                continue
            own.append(job)
            fresh.append(job)
        return fresh

    def end(self, job: ImportJob, report: ImportReport) -> ImportReport | None:
        """A job has ended; return the report of its request's import, None if that goes on."""
        jobs = self._jobs.get(job.request_id, ())
        if len(jobs) > 1:
            reports = self._reports.setdefault(job.request_id, {})
            reports[job.number] = report
            if len(reports) < len(jobs):
                return None
            del self._reports[job.request_id]
            first, *others = (reports[each.number] for each in jobs)
            report = replace(first, further=tuple(others))
        self._jobs.pop(job.request_id, None)
        if refused := self._refused.pop(job.request_id, None):
            report = replace(report, failed_blocks=report.failed_blocks | refused, reason=report.reason or TWICE)
        return report

    def under_way(self) -> list[ImportJob]:
        """Return the jobs that have not ended."""
        return [job for name, jobs in self._jobs.items() for job in jobs if job.number not in self._reports.get(name, {})]

    def checked(self, found: Mapping[JobId, int]) -> dict[str, int]:
        """Return how many leading blocks of imports under way are good; `found` says it of jobs that have not ended."""
        names = {name for name, _ in found} | self._reports.keys()
        good = {name: self._leading(name, found) for name in names if name in self._jobs and name not in self._refused}
        return {name: blocks for name, blocks in good.items() if blocks}

    def _leading(self, name: str, found: Mapping[JobId, int]) -> int:
        blocks, reports = 0, self._reports.get(name, {})
        for job in self._jobs[name]:
            report = reports.get(job.number)
            if report is None:
                return blocks + found.get(job.id, 0)
            if report.failed_blocks:
                return blocks
            blocks += len(job)
        return blocks
