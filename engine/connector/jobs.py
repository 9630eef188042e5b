"""The import jobs that a worker has under way: a request's import has ended when all its jobs have."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from engine.connector.step_messages import ImportReport
from transport.backends.base import ImportJob, JobId


class Jobs:
    """By request; those of a request begin together, one for each source, in the order of the prompt.

    Until the last of them has ended nothing is told of a request's import but how much of it is good: vLLM would give its
    blocks away, and the rest may still be written.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, list[ImportJob]] = {}
        self._reports: dict[str, dict[int, ImportReport]] = {}
        """Of requests of whose jobs some have ended, but not all."""

    def begin(self, jobs: Iterable[ImportJob]) -> None:
        """These jobs are about to begin."""
        for job in jobs:
            self._jobs.setdefault(job.request_id, []).append(job)

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
        return report

    def under_way(self) -> list[ImportJob]:
        """Return the jobs that have not ended."""
        return [job for name, jobs in self._jobs.items() for job in jobs if job.number not in self._reports.get(name, {})]

    def checked(self, found: Mapping[JobId, int]) -> dict[str, int]:
        """Return how many leading blocks of imports under way are good; `found` says it of jobs that have not ended."""
        names = {name for name, _ in found} | self._reports.keys()
        good = {name: self._leading(name, found) for name in names if name in self._jobs}
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
