"""Which prompts wait for which, while they are tokenised beside the event loop."""

from __future__ import annotations

import asyncio
import threading

from gateway.prompts.prompt_reader import LONG_THREADS, SHORT_CHARS_MAX, PromptReader
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService


async def test_short_prompts_do_not_wait_for_long_ones_of_which_few_run_at_a_time() -> None:
    reader = PromptReader(TokenService(TokenizerSource("no-such-model")), 0, lambda: None)
    running, most, ends = 0, 0, threading.Event()

    def tokenise() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        ends.wait(30)
        running -= 1

    long = [asyncio.create_task(reader.in_thread(SHORT_CHARS_MAX + 1, tokenise)) for _ in range(3 * LONG_THREADS)]
    try:
        for _ in range(10):
            assert await asyncio.wait_for(reader.in_thread(SHORT_CHARS_MAX, lambda: "short"), 10) == "short"
        assert not any(task.done() for task in long)
    finally:
        ends.set()
    await asyncio.gather(*long)
    assert most <= LONG_THREADS
