"""Records of requests wait for a moment and are measured together."""

from __future__ import annotations

import pytest

from gateway.api.usage import Usage
from gateway.relay import record_queue
from gateway.relay.record_queue import RecordQueue
from gateway.relay.request_record import ENDING_BYTES_MAX, RequestRecord
from tests.unit.gateway.running_door import until

COUNTS = b'{"usage":{"prompt_tokens":7,"completion_tokens":3}}'


class Heard:
    def __init__(self) -> None:
        self.ids: list[str] = []
        self.usages: list[Usage | None] = []

    def answered(self, record: RequestRecord) -> None:
        self.ids.append(record.request_id)
        self.usages.append(record.usage)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def queue(heard: Heard) -> RecordQueue:
    queue = RecordQueue()
    queue.meters = (heard,)
    return queue


async def test_a_lone_record_is_measured_soon(queue: RecordQueue, heard: Heard) -> None:
    queue.add(RequestRecord("chat", request_id="one"))
    assert heard.ids == []
    await until(lambda: heard.ids == ["one"])


async def test_many_are_measured_at_once_and_each_only_once(
    queue: RecordQueue, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_queue, "RECORDS_MAX", 3)
    for number in range(4):
        queue.add(RequestRecord("chat", request_id=str(number)))
    assert heard.ids == ["0", "1", "2"]
    queue.flush()
    queue.flush()
    assert heard.ids == ["0", "1", "2", "3"]


async def test_counts_of_tokens_are_read_then_and_stand_in_place_of_events(queue: RecordQueue, heard: Heard) -> None:
    record = RequestRecord("chat", events=5)
    record.ends_with(COUNTS)
    assert record.usage is None
    queue.add(record)
    queue.flush()
    assert heard.usages == [Usage(7, 3)]
    assert (record.events, record.ending) == (0, b"")


def test_a_large_answer_is_not_kept_for_its_counts() -> None:
    record = RequestRecord("chat")
    record.ends_with(b" " * ENDING_BYTES_MAX + COUNTS)
    assert (record.usage, record.ending) == (Usage(7, 3), b"")
