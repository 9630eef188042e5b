"""The ends of peerkv itself: `kill -9` leaves nothing behind, SIGTERM lets requests finish. The very last tests."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

from tests.real.conftest import assert_no_trace
from tests.real.fleet import ANSWER_SECONDS_MAX, MARK, STOP_SECONDS_MAX, until
from tests.real.leftovers import marked_processes


def test_after_a_kill_of_the_gateway_nothing_is_left_and_a_new_one_starts_and_ends_in_order(fleet, words, shared_memory_before):
    assert len(marked_processes(MARK, fleet.mark)) >= 4  # the gateway, its host, two replicas
    body = fleet.body(words.text(20), max_tokens=2000, logprobs=None, stream=True)
    with fleet.client.stream("POST", "/v1/completions", json=body, headers=fleet.headers()) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.kill(fleet.process.pid, signal.SIGKILL)
        assert fleet.process.wait(STOP_SECONDS_MAX) == -signal.SIGKILL
    assert_no_trace(fleet, shared_memory_before)

    fleet.start()
    fleet.wait_ready()
    request = fleet.body(words.text(300), max_tokens=60, logprobs=None)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(fleet.client.post, "/v1/completions", json=request, headers=fleet.headers())
        until(lambda: fleet.stats()["totals"]["in_flight"] == 1, ANSWER_SECONDS_MAX, "the request is with a replica")
        fleet.process.send_signal(signal.SIGTERM)
        answer = asked.result(ANSWER_SECONDS_MAX)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 60
    assert fleet.process.wait(STOP_SECONDS_MAX) == 0
    assert_no_trace(fleet, shared_memory_before)
