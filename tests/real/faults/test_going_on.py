"""A replica killed under streams: each goes on with the tokens of an undisturbed one. Chats are parsed here, for tool calls."""

from __future__ import annotations

import asyncio
import os
import signal

import openai
import pytest

from bench.continuity import stream
from tests.real.fleet import REPLICAS, RESTART_SECONDS_MAX, Fleet
from tests.real.prompts import Words

TOKENS = 48
STREAMS = 4
FORMS = ("completions", "chat")


@pytest.mark.parametrize("killed", REPLICAS)
def test_streams_of_a_killed_replica_go_on_elsewhere_as_if_nothing_had_happened(
    fleet: Fleet, words: Words, killed: str
) -> None:
    async def main() -> int:
        async with openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key=fleet.key, max_retries=0) as client:
            requests = [(FORMS[number % 2], words.text(60)) for number in range(STREAMS)]
            begun = [asyncio.Event() for _ in requests]
            tasks = [
                asyncio.create_task(stream(client, form, prompt, TOKENS, event, fleet.model))
                for (form, prompt), event in zip(requests, begun, strict=True)
            ]
            await asyncio.gather(*(event.wait() for event in begun))
            os.kill(fleet.pid(killed), signal.SIGKILL)
            disturbed = await asyncio.gather(*tasks)
            await asyncio.to_thread(fleet.wait_ready, RESTART_SECONDS_MAX)
            for (form, prompt), each in zip(requests, disturbed, strict=True):
                whole = await stream(client, form, prompt, TOKENS, model=fleet.model)
                assert each.same_as(whole), (form, each, whole)
            return sum(each.replica == killed for each in disturbed)

    before = fleet.stats()["gateway"]
    cut = asyncio.run(main())
    after = fleet.stats()["gateway"]
    assert after["streams_broken"] == before["streams_broken"]
    assert after["streams_continued"] - before["streams_continued"] == cut
    assert cut
