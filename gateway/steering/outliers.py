"""Which replicas get nothing for now, since their answers fail: Envoy's outlier ejection, with half-open probing. Pure.

A replica that answers 500 at once looks idle, and would get most of what comes. After a few failures in a row, or many among
its last answers, it is ejected for a time that doubles with each ejection. Then it is half-open: one request at a time goes
there, and what becomes of it decides. If nobody else is left, an ejected replica gets requests as before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

FAILED_STATUSES = frozenset({429, 500, 502, 503, 504})
OUTCOMES_REMEMBERED = 16
FAILED_SHARE_MAX = 0.5
"""Of the outcomes that are remembered: as many failures eject a replica even if some answers between them are well."""
_OUTCOMES = (1 << OUTCOMES_REMEMBERED) - 1


class OutlierState(StrEnum):
    """Whether a replica gets requests."""

    WELL = "well"
    EJECTED = "ejected"
    HALF_OPEN = "half-open"  # one request at a time
    SUSPECT = "suspect"  # its requests are far overdue, or its health is in doubt


@dataclass(frozen=True, slots=True)
class Ejection:
    """What is to be told of a replica: `seconds_left` until it is tried again, 0 if it may be; `why` is "" when well."""

    standing: OutlierState = OutlierState.WELL
    why: str = ""
    seconds_left: float = 0.0
    ejections: int = 0


NEVER = Ejection()


class _Record:
    __slots__ = ("ejected_until", "ejections", "in_a_row", "outcomes", "probing", "status", "well_since")

    def __init__(self) -> None:
        self.outcomes = 0  # a bit each, the newest lowest; 1: failed
        self.status = 0  # of the last failure, 0 for a connection that broke
        self.ejections = 0
        self.in_a_row = 0  # ejections without a good time between
        self.ejected_until: float | None = None
        self.well_since = 0.0
        self.probing = False


class Outliers:
    """Belongs to one thread. `failures_max` in a row eject, 0: nothing does; times are seconds."""

    def __init__(self, failures_max: int, seconds_min: float, seconds_max: float) -> None:
        self._failures_max = failures_max
        self._row = (1 << failures_max) - 1
        self._seconds_min, self._seconds_max = seconds_min, seconds_max
        self._records: dict[str, _Record] = {}
        self._suspects: Mapping[str, str] = {}
        self._ejected = 0  # records that are not well

    def keep(self, names: Collection[str]) -> None:
        """Forget all others. To forget one that was restarted, leave it out once."""
        self._records = {name: record for name, record in self._records.items() if name in names}
        self._ejected = sum(record.ejected_until is not None for record in self._records.values())

    def suspect(self, why: Mapping[str, str]) -> None:
        """These replicas, by name, get nothing for these reasons, until told otherwise."""
        self._suspects = why

    @property
    def suspects(self) -> Mapping[str, str]:
        """As last told."""
        return self._suspects

    def ended(self, replica: str, status: int, now: float) -> None:
        """A request ended there; `status` 0 for a connection that broke, 499 for a client that left, which says nothing."""
        failed = status in FAILED_STATUSES or status == 0
        record = self._records.get(replica)
        if record is None:
            if not failed or not self._failures_max:
                return
            record = self._records[replica] = _Record()
        if record.ejected_until is not None:
            self._probed(record, status, failed, now)
            return
        if status == 499:
            return
        record.outcomes = (record.outcomes << 1 | failed) & _OUTCOMES
        if not failed:
            return
        record.status = status
        if record.outcomes & self._row == self._row or record.outcomes.bit_count() >= OUTCOMES_REMEMBERED * FAILED_SHARE_MAX:
            self._eject(record, now)

    def sent(self, replica: str) -> None:
        """A request is about to be sent there; to one that is half-open no other goes before its end."""
        if self._ejected and (record := self._records.get(replica)) is not None and record.ejected_until is not None:
            record.probing = True

    def began(self, replica: str, now: float) -> None:
        """A stream began there: whoever half-open waits for its end would wait for long."""
        if self._ejected and (record := self._records.get(replica)) is not None and record.ejected_until is not None:
            self._probed(record, 200, False, now)

    def takers(self, names: Collection[str], now: float) -> Collection[str]:
        """Those of `names` that get requests: all of them if otherwise none would. The same object while all are well."""
        if not self._ejected and not self._suspects:
            return names
        found = [name for name in names if name not in self._suspects and self._takes(name, now)]
        return found or names

    def seen(self, replica: str, now: float) -> Ejection:
        """What there is to tell of a replica."""
        record = self._records.get(replica)
        ejections = record.ejections if record is not None else 0
        if replica in self._suspects:
            return Ejection(OutlierState.SUSPECT, self._suspects[replica], 0.0, ejections)
        if record is None or record.ejected_until is None:
            return Ejection(ejections=ejections)
        left = max(0.0, record.ejected_until - now)
        failed = f"answered {record.status}" if record.status else "broke off"
        standing = OutlierState.EJECTED if left else OutlierState.HALF_OPEN
        return Ejection(standing, f"its last requests failed: the newest {failed}", left, ejections)

    def _takes(self, name: str, now: float) -> bool:
        record = self._records.get(name)
        if record is None or record.ejected_until is None:
            return True
        return record.ejected_until <= now and not record.probing

    def _probed(self, record: _Record, status: int, failed: bool, now: float) -> None:
        """A request of an ejected replica ended: those that were sent before its ejection say nothing new."""
        if not record.probing:
            return
        record.probing = False
        if failed:
            record.status = status
            self._ejected -= 1
            self._eject(record, now)
        elif status != 499:
            record.ejected_until, record.outcomes, record.well_since = None, 0, now
            self._ejected -= 1

    def _eject(self, record: _Record, now: float) -> None:
        if record.ejected_until is None and now - record.well_since > self._seconds_max:
            record.in_a_row = 0
        record.ejected_until = now + min(self._seconds_max, self._seconds_min * 2.0 ** min(record.in_a_row, 32))
        record.ejections += 1
        record.in_a_row += 1
        record.outcomes = 0
        self._ejected += 1
