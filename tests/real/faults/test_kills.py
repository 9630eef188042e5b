"""`kill -9` of replicas and owners: every request ends in a right answer or a clear error, and all comes back."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import msgspec
import pytest

from tests.real.fleet import ANSWER_SECONDS_MAX, REPLICAS, RESTART_SECONDS_MAX, ROOT, until
from tests.real.leftovers import leaked_files
from tests.real.owner import wait_readable, watch_opens

BLOCK = 32
ROUNDS_MAX = 12
LENGTH = 400
WHOLE = (LENGTH - 1) // BLOCK * BLOCK
KILLS = 2


@dataclass
class Stream:
    """What a client got of an event stream from a replica. `error` is the error event's object, `done` whether [DONE] came."""

    replica: str
    text: str = ""
    events: int = 0
    error: dict = field(default_factory=dict)
    done: bool = False

    def read(self, fleet, body) -> "Stream":
        headers = fleet.headers() | {"x-peerkv-replica": self.replica}
        with fleet.client.stream("POST", "/v1/completions", json=body | {"stream": True}, headers=headers) as answer:
            for line in answer.iter_lines():
                self.take(line)
        return self

    def take(self, line: str) -> None:
        if not line:
            return
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            self.done = True
            return
        event = json.loads(data)
        self.error = event.get("error") or {}
        self.text += event["choices"][0]["text"] if "choices" in event else ""
        self.events += 1


@pytest.mark.parametrize("replica", REPLICAS)
def test_requests_of_a_killed_replica_end_in_a_right_answer_or_a_clear_error(fleet, words, replica):
    """Two streams are pinned to each replica; of those that are free to go anywhere, some are with the one that is killed."""
    body = fleet.body(words.text(20), max_tokens=100, logprobs=None)
    wanted = fleet.client.post("/v1/completions", json=body, headers=fleet.headers()).json()["choices"][0]["text"]
    before = fleet.stats()["gateway"]
    streams = [Stream(name) for name in REPLICAS * 2]
    with ThreadPoolExecutor(16) as pool:
        read = [pool.submit(stream.read, fleet, body) for stream in streams]
        until(lambda: all(stream.events for stream in streams), ANSWER_SECONDS_MAX, "all streams have begun")
        whole = [pool.submit(fleet.client.post, "/v1/completions", json=body, headers=fleet.headers()) for _ in range(8)]
        until(lambda: fleet.replica_stats(replica)["in_flight"] > 2, ANSWER_SECONDS_MAX, "requests are with the replica")
        steps = [stream.events + 5 for stream in streams]  # in which the requests beside them have begun too
        until(lambda: all(s.events >= n for s, n in zip(streams, steps, strict=True)), ANSWER_SECONDS_MAX, "they are computed")
        fleet.kill(replica)
        answers = [future.result(ANSWER_SECONDS_MAX) for future in whole]
        ended = [future.result(ANSWER_SECONDS_MAX) for future in read]

    for answer in answers:  # nothing had been sent of them, so they were sent again
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == wanted
    for stream in ended:
        if stream.done:
            assert stream.text == wanted
        else:
            assert stream.error["code"] == "replica_lost"
            assert wanted.startswith(stream.text)
    assert any(not stream.done for stream in ended)
    assert any(stream.done for stream in ended)
    after = fleet.stats()["gateway"]
    assert after["retries"] > before["retries"]
    assert after["streams_broken"] - before["streams_broken"] == sum(not stream.done for stream in ended)


def test_a_killed_replica_comes_back_and_exchanges_in_its_new_epoch(fleet, words, shared_memory_before):
    held = words.text(LENGTH)
    cold = fleet.answer(held, replica="replica-1")
    with closing(fleet.table("replica-0")) as former:
        fleet.kill("replica-0")
        until(lambda: not former.alive(), RESTART_SECONDS_MAX, "its engine has ended")  # a moment after its server
        fleet.wait_ready(RESTART_SECONDS_MAX)
        with closing(fleet.table("replica-0")) as table:
            assert table.epoch > former.epoch
    with fleet.counting("replica-0") as counted:
        assert fleet.answer(held, replica="replica-0").close_to(cold)
    assert counted.peer == WHOLE
    fresh = words.text(LENGTH)
    cold = fleet.answer(fresh, replica="replica-0")
    with fleet.counting("replica-1") as counted:
        assert fleet.answer(fresh, replica="replica-1").close_to(cold)
    assert counted.peer == WHOLE
    assert fleet.stats()["totals"]["ready"] == 2
    assert leaked_files(shared_memory_before) == []


def test_imports_from_a_replica_that_is_killed_meanwhile_end_right(fleet, words):
    """Many imports from replica-0 are under way when it dies: replica-1 computes what it did not get.

    Every round must end right. The kill has some 20 ms to land in, so it is given rounds until it makes an import fall short.
    """
    assert any(killed_while_read(fleet, words) for _ in range(ROUNDS_MAX)), "no import fell short"


def killed_while_read(fleet, words) -> bool:
    """One round; tell whether at least one import fell short."""
    fleet.kill("replica-0")  # so that nobody has its memory open
    fleet.wait_ready(RESTART_SECONDS_MAX)
    prompts = [words.text(LENGTH) for _ in range(6)]
    wanted = [fleet.answer(prompt, replica="replica-0") for prompt in prompts]
    former = fleet.pid("replica-0")
    with closing(fleet.table("replica-0")) as table:
        handle = msgspec.json.decode(table.memories[0].regions[0].handle)
        watch = watch_opens(f"/proc/{handle['pid']}/fd/{handle['fd']}")

    def kill_when_read() -> None:
        wait_readable([watch], ANSWER_SECONDS_MAX)
        os.kill(former, signal.SIGKILL)

    killer = threading.Thread(target=kill_when_read)
    killer.start()
    try:
        with fleet.counting("replica-1") as counted, ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: fleet.answer(prompt, replica="replica-1"), prompts))
    finally:
        killer.join()
        os.close(watch)
    assert all(answer.close_to(right) for answer, right in zip(answers, wanted, strict=True))
    assert counted.prompt == len(prompts) * LENGTH
    assert counted.peer + counted.computed == counted.prompt
    assert counted.counts["imports"] > 0
    until(lambda: fleet.restarted("replica-0", former), RESTART_SECONDS_MAX, "replica-0 is started anew")
    return counted.computed > len(prompts) * (LENGTH - WHOLE)


@contextlib.contextmanager
def suicidal_owner(fleet, ids, salt):
    """A process that holds a prompt in its own memory, as replica-y, and is killed when an import opens it."""
    command = [sys.executable, "-m", "tests.real.owner", "--table-dir", str(fleet.table_dir), "--name", "replica-y"]
    process = subprocess.Popen(
        [*command, "--like", "replica-0"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        process.stdin.write(json.dumps({"ids": ids, "salt": salt}) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_an_owner_that_is_killed_in_the_middle_of_an_import_is_not_believed(fleet, words, salt):
    ids = words.ids(LENGTH)
    wanted = fleet.answer(ids, replica="replica-0")
    for _ in range(KILLS):
        fleet.forget("replica-1")
        with suicidal_owner(fleet, ids, salt) as process, fleet.counting("replica-1") as counted:
            hint = {"peerkv": {"source": "replica-y"}}
            answer = fleet.direct("replica-1", ids, cache_salt=salt, kv_transfer_params=hint)
            assert process.wait(ANSWER_SECONDS_MAX) == -signal.SIGKILL
        assert answer.close_to(wanted)
        assert (counted.peer, counted.computed) == (0, LENGTH)
        assert counted.counts["fallbacks"] == 1


def test_both_replicas_killed_at_once_come_back(fleet, words):
    body = fleet.body(words.text(20), max_tokens=200, logprobs=None)
    former = {replica: fleet.pid(replica) for replica in REPLICAS}
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(fleet.client.post, "/v1/completions", json=body, headers=fleet.headers()) for _ in range(4)]
        until(lambda: fleet.stats()["totals"]["in_flight"] == 4, ANSWER_SECONDS_MAX, "requests are in flight")
        for pid in former.values():
            os.kill(pid, signal.SIGKILL)
        answers = [future.result(ANSWER_SECONDS_MAX) for future in asked]
    for answer in answers:
        if answer.status_code != 200:
            assert answer.status_code in (502, 503)
            assert answer.json()["error"]["code"] in ("replica_lost", "no_replica_ready")
            assert int(answer.headers["retry-after"]) > 0
    for replica, pid in former.items():
        until(lambda r=replica, p=pid: fleet.restarted(r, p), RESTART_SECONDS_MAX, f"{replica} is started anew")
    fleet.wait_ready(RESTART_SECONDS_MAX)
    assert fleet.client.post("/v1/completions", json=body | {"max_tokens": 4}, headers=fleet.headers()).status_code == 200
