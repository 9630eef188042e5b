"""Records of requests that are over wait here for a moment, and are measured together.

The code that measures is not in the processor's inner caches when a request ends (batching.py says why): in a row, the second
record and those behind it cost a third of the first.
"""

from __future__ import annotations

import asyncio

from gateway.relay.request_record import Meter, RequestRecord

RECORDS_MAX = 64
WAIT_SECONDS = 0.1


class RecordQueue:
    """Belongs to one event loop. `meters` hear of each record once, at most WAIT_SECONDS after the request."""

    def __init__(self) -> None:
        self.meters: tuple[Meter, ...] = ()
        self._records: list[RequestRecord] = []

    def add(self, record: RequestRecord) -> None:
        """A request is over."""
        self._records.append(record)
        waiting = len(self._records)
        if waiting >= RECORDS_MAX:
            self.flush()
        elif waiting == 1:
            asyncio.get_running_loop().call_later(WAIT_SECONDS, self.flush)

    def flush(self) -> None:
        """Measure all that wait."""
        records, self._records = self._records, []
        for record in records:
            record.read_counts()
            for meter in self.meters:
                meter.answered(record)
