"""Replicas that die, fail or do not answer: who is asked next, and what the client gets."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from pathlib import Path

import openai
import pytest

from engine.fleet import ReplicaState
from tests.unit.gateway.relay.relay_client import COMPLETION, client_of, lines_of
from tests.unit.gateway.running_door import Door, end, running_door, until


async def test_a_connection_that_drops_before_the_head_is_tried_again_and_then_elsewhere(door: Door) -> None:
    await door.add_engine("replica-1")
    await door.add_engine("replica-2")
    fake = {"on": "replica-0", "drop": "before"}
    status, _, headers = await door.post("/v1/completions", COMPLETION | {"fake": fake})
    assert status == 200
    assert headers["x-peerkv-replica"] == "replica-1"
    assert len((await door.seen("replica-0"))["requests"]) == 2  # the first connection was not new, and may have been stale
    assert door.fleet.suspects == ["replica-0"]
    assert door.recorder.in_flight == {"replica-0": 0, "replica-1": 0}


async def test_a_request_that_ends_its_replicas_ends_two_at_most_and_not_the_last_one(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        processes = [await door.add_process(f"replica-{i}") for i in range(3)]
        status, body, headers = await door.post("/v1/completions", COMPLETION | {"fake": {"die": "before"}})
        assert (status, body["error"]["code"], int(headers["retry-after"]) > 0) == (502, "replica_lost", True)
        assert [await process.wait() for process in processes[:2]] == [9, 9]
        door.fleet.set_state("replica-0", ReplicaState.BACKOFF)
        door.fleet.set_state("replica-1", ReplicaState.STARTING)
        assert (await door.seen("replica-2"))["requests"] == []


async def test_with_one_replica_left_a_request_that_may_have_ended_the_other_goes_no_further(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        process = await door.add_process("replica-0")
        await door.add_engine("replica-1")
        status, body, _ = await door.post("/v1/completions", COMPLETION | {"fake": {"die": "before"}})
        assert (status, body["error"]["code"]) == (502, "replica_lost")
        assert await process.wait() == 9
        assert (await door.seen("replica-1"))["requests"] == []


async def test_a_request_that_its_replica_had_borne_goes_to_the_last_one_too(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        process = await door.add_process("replica-0")
        await door.add_engine("replica-1")
        door.recorder.borne = True
        waits = asyncio.create_task(door.post("/v1/completions", COMPLETION | {"fake": {"on": "replica-0", "delay": 60}}))
        await until(lambda: door.recorder.in_flight.get("replica-0"))
        process.kill()
        status, body, _ = await waits
        assert (status, body["system_fingerprint"]) == (200, "replica-1")


async def test_an_engine_that_ended_is_a_lost_replica_whatever_its_server_answers(tmp_path: Path) -> None:
    """vLLM's server answers 500 to what its dead engine held, and ends."""
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        await door.add_engine("replica-1")
        status, body, _ = await door.post("/v1/completions", COMPLETION | {"fake": {"engine_died": True}})
        assert (status, body["error"]["code"]) == (502, "replica_lost")
        assert (await door.seen("replica-1"))["requests"] == []


async def test_requests_that_wait_for_a_replica_can_be_moved_while_nothing_of_an_answer_came(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        await door.add_engine("replica-1")
        slow = COMPLETION | {"fake": {"on": "replica-0", "delay": 60}}
        begun = COMPLETION | {"stream": True, "max_tokens": 500, "fake": {"token_delay": 0.01}}
        whole, silent = (asyncio.create_task(door.post("/v1/completions", body)) for body in (slow, slow))
        pinned = asyncio.create_task(door.post("/v1/completions", slow, headers={"x-peerkv-replica": "replica-0"}))
        async with door.session.post(door.url + "/v1/completions", json=begun) as stream:
            await stream.content.readany()
            await until(lambda: door.recorder.in_flight["replica-0"] == 4)
            await until(lambda: door.upstream.give_up("replica-0", "it stands still") == 2)
            for status, body, _ in (await whole, await silent):
                assert (status, body["system_fingerprint"]) == (200, "replica-1")
            assert door.recorder.in_flight["replica-0"] == 2
            assert await stream.content.readany()
        pinned.cancel()


async def test_an_answer_of_429_is_tried_elsewhere(door: Door) -> None:
    await door.add_engine("replica-1")
    status, _, headers = await door.post("/v1/completions", COMPLETION | {"fake": {"on": "replica-0", "status": 429}})
    assert (status, headers["x-peerkv-replica"]) == (200, "replica-1")


async def test_out_of_descriptors_a_request_waits_for_one_and_blames_no_replica(tmp_path: Path) -> None:
    async with running_door(tmp_path, connect_seconds=0.5) as door:
        await door.add_process("replica-0")
        await door.post("/v1/completions", COMPLETION)
        async with door.session.post(door.url + "/v1/completions", json=COMPLETION | {"fake": {"delay": 0.3}}) as warm:
            await warm.read()
        for connections in door.upstream._idle.values():
            connections.clear()  # closed neither here nor there: they hold their descriptors
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(least_free := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (least_free, hard))
        try:
            status, body, _ = await door.post("/v1/completions", COMPLETION)
            assert (status, "Too many open files" in body["error"]["message"]) == (503, True)
            asked = asyncio.create_task(door.post("/v1/completions", COMPLETION))
            await until(lambda: door.relay.in_flight)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (await asked)[0] == 200
        assert door.fleet.suspects == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_replica_that_dies_before_the_first_byte_is_replaced(tmp_path: Path, stream: bool) -> None:
    async with running_door(tmp_path) as door:
        process = await door.add_process("replica-0")
        await door.add_engine("replica-1")
        await door.add_engine("replica-2")
        fake = {"on": "replica-0", "die": "mid", "after": 0}
        lines = await lines_of(door, "/v1/completions", COMPLETION | {"stream": stream, "fake": fake})
        assert await process.wait() == 9
        assert ("[DONE]" in lines[-1]) == stream
        assert '"system_fingerprint": "replica-1"' in lines[0]
        assert door.relay.counters.retries == 1


async def test_a_whole_answer_that_breaks_off_is_made_anew_elsewhere(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        await door.add_process("replica-0")
        await door.add_engine("replica-1")
        door.recorder.borne = True
        status, body, _ = await door.post("/v1/completions", COMPLETION | {"fake": {"on": "replica-0", "die": "mid"}})
        assert (status, body["system_fingerprint"]) == (200, "replica-1")


async def test_a_stream_that_breaks_midway_ends_with_an_error_event_and_no_done(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        await door.add_process("replica-0")
        await door.add_engine("replica-1")
        fake = {"on": "replica-0", "die": "mid", "after": 2, "token_delay": 0.02}
        lines = await lines_of(door, "/v1/completions", COMPLETION | {"stream": True, "max_tokens": 9, "fake": fake})
        texts = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert [t["choices"][0]["text"] for t in texts[:-1]] == ["w0 ", "w1 "]
        assert texts[-1]["error"]["code"] == "replica_lost"
        assert door.relay.counters.streams_broken == 1


async def test_the_openai_client_raises_on_a_stream_that_breaks(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door, client_of(door) as client:
        await door.add_process("replica-0")
        fake = {"fake": {"die": "mid", "after": 2, "token_delay": 0.02}}
        stream = await client.completions.create(**COMPLETION, stream=True, extra_body=fake)
        with pytest.raises(openai.APIError, match="lost"):
            async for _ in stream:
                pass


async def test_a_killed_replica_with_idle_connections_costs_nobody_an_error(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        process = await door.add_process("replica-0")
        await door.add_engine("replica-1")
        await asyncio.gather(*(door.post("/v1/completions", COMPLETION) for _ in range(5)))
        await end(process)
        answers = await asyncio.gather(*(door.post("/v1/completions", COMPLETION) for _ in range(5)))
        assert {(status, headers["x-peerkv-replica"]) for status, _, headers in answers} == {(200, "replica-1")}


async def test_when_the_only_replica_dies_the_answer_is_502_with_retry_after(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        await door.add_process("replica-0")
        status, body, headers = await door.post("/v1/completions", COMPLETION | {"fake": {"die": "before"}})
        assert (status, body["error"]["code"]) == (502, "replica_lost")
        assert int(headers["retry-after"]) > 0


async def test_a_lone_replica_that_breaks_off_and_stays_ready_is_lost_and_not_unready(door: Door) -> None:
    status, body, headers = await door.post("/v1/completions", COMPLETION | {"fake": {"drop": "mid", "after": 1}})
    assert (status, body["error"]["code"]) == (502, "replica_lost")
    assert int(headers["retry-after"]) > 0


async def test_a_500_is_tried_elsewhere_and_passed_on_when_there_is_no_elsewhere(door: Door) -> None:
    fake = {"fake": {"on": "replica-0", "status": 500}}
    status, body, _ = await door.post("/v1/completions", COMPLETION | fake)
    assert (status, body["error"]["message"]) == (500, "as you asked")
    await door.add_engine("replica-1")
    status, _, headers = await door.post("/v1/completions", COMPLETION | fake)
    assert (status, headers["x-peerkv-replica"]) == (200, "replica-1")


async def test_retries_are_bounded(tmp_path: Path) -> None:
    async with running_door(tmp_path, retry_attempts_max=1) as door:
        for i in range(3):
            await door.add_engine(f"replica-{i}")
        status, body, _ = await door.post("/v1/completions", COMPLETION | {"fake": {"drop": "before"}})
        assert (status, body["error"]["code"]) == (502, "replica_lost")
        assert [p.replica.name for p in door.planner.plans] == ["replica-0", "replica-1"]


async def test_a_replica_that_does_not_begin_in_time_is_504(tmp_path: Path) -> None:
    async with running_door(tmp_path, response_head_seconds_max=0.1) as door:
        await door.add_engine("replica-0")
        status, body, _ = await door.post("/v1/completions", COMPLETION | {"fake": {"delay": 30}})
        assert (status, body["error"]["code"]) == (504, "replica_timeout")


async def test_the_words_of_a_dead_engine_in_an_answer_are_an_answer(tmp_path: Path) -> None:
    words = {"choices": [{"text": "vLLM says: EngineCore encountered an issue."}]}
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        for status in (200, 400):
            sent = COMPLETION | {"fake": {"status": status, "error": words}}
            assert (await door.post("/v1/completions", sent))[0] == status
