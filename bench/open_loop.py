"""Plays a workload's conversations against one address and times every answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from bench.workloads import Talk, Turn

ANSWER_SECONDS_MAX = 300.0
_DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. `sent_at` counts from the start of the run, times are in seconds; `error` is empty for a complete answer."""

    sent_at: float
    first_seconds: float
    seconds: float
    answer_tokens: int
    prompt_tokens: int
    error: str = ""


class Player:
    """Sends requests to `url`, with `extra` fields in each body."""

    def __init__(self, url: str, model: str, extra: Mapping[str, object]) -> None:
        self._url = url
        self._fixed: dict[str, Any] = {"model": model, "temperature": 0, "ignore_eos": True, "stream": True} | dict(extra)
        self._fixed["stream_options"] = {"include_usage": True}
        self.samples: list[Sample] = []
        self._began = 0.0

    async def play(self, talks: Iterable[Talk]) -> float:
        """Play everything; return the seconds from the first arrival to the last answer."""
        self._began = time.perf_counter()
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS_MAX)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as group:
            for talk in talks:
                group.create_task(self._talk(session, talk))
        return time.perf_counter() - self._began

    async def _talk(self, session: aiohttp.ClientSession, talk: Talk) -> None:
        await asyncio.sleep(max(0.0, talk.at - (time.perf_counter() - self._began)))
        said: list[dict[str, str]] = []
        for turn in talk.turns:
            await asyncio.sleep(turn.pause)
            said.append({"role": "user", "content": turn.text})
            asked: dict[str, Any] = {"messages": said} if talk.chat else {"prompt": turn.text}
            path = "/v1/chat/completions" if talk.chat else "/v1/completions"
            answer = await self._ask(session, path, asked, turn)
            if answer is None:
                return
            said.append({"role": "assistant", "content": answer})

    async def _ask(self, session: aiohttp.ClientSession, path: str, asked: Mapping[str, Any], turn: Turn) -> str | None:
        """Return the answer's text, or None if there was none. Its times go into the samples either way."""
        body = msgspec.json.encode(self._fixed | dict(asked) | {"max_tokens": turn.answer_tokens})
        began = time.perf_counter()
        reader = _Events()
        error = ""
        try:
            async with session.post(self._url + path, data=body, headers={"content-type": "application/json"}) as response:
                if response.status != 200:
                    error = f"status {response.status}: {(await response.text())[:300]}"
                else:
                    async for line in response.content:
                        reader.read(line, time.perf_counter())
                    error = reader.error(turn.answer_tokens)
        except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError) as broken:
            error = repr(broken)
        ended = time.perf_counter()
        first = (reader.first_at or ended) - began
        self.samples.append(
            Sample(began - self._began, first, ended - began, reader.answer_tokens, reader.prompt_tokens, error)
        )
        return None if error else reader.text


class _Events:
    """Reads an event stream line by line."""

    def __init__(self) -> None:
        self.first_at = 0.0
        self.answer_tokens = self.prompt_tokens = 0
        self.text = ""
        self._done = False
        self._broken = ""

    def read(self, line: bytes, now: float) -> None:
        if not line.startswith(b"data:"):
            return
        data = line[5:].strip()
        if data == _DONE:
            self._done = True
            return
        event = msgspec.json.decode(data)
        if "error" in event:
            self._broken = str(event["error"])[:300]
        for choice in event.get("choices") or ():
            self.first_at = self.first_at or now  # a chat's first event names the role, and comes with its first token
            self.text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        if usage := event.get("usage"):
            self.answer_tokens, self.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]

    def error(self, answer_tokens: int) -> str:
        """Return what is wrong with the stream that ended; empty if nothing is."""
        if self._broken or not self._done:
            return self._broken or "the stream ended early"
        if self.answer_tokens != answer_tokens:
            return f"{self.answer_tokens} tokens came of {answer_tokens}"
        return ""
