"""Large bodies are read in processes of their own: one that is decoded, rendered and tokenised here would hold up all others.

Nothing that does so gives up the interpreter's lock: 31 MB of JSON take 0.1 to 0.5 s to pass over, ten times that to decode.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from gateway.api.endpoints import Endpoint
from gateway.api.partial_decode import Span
from gateway.errors import ApiError, Unavailable
from gateway.prompts.prompt_reader import KnownPrompt, PromptReader
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.relay.large_bodies.messages import LENGTH_BYTES, Job, OfFleet, Reading, Refusal, Setup

SLICE_BYTES = 256 << 10
"""So much of a body is handed over at a time, for others to have their turn."""
BODY_BYTES_MAX = 2 << 30
"""Memory of such a process for a body: 31 MB of JSON, decoded, take up to 1 GiB."""
TOKENIZER_BYTES_MAX = 1 << 30
"""Memory of such a process for each fleet: a tokenizer and its caches."""
READ_SECONDS_MAX = 180.0
"""A process that takes longer for one body does not come back: it is ended, or the next bodies would wait for it for ever."""
_WORKER = ("-m", "gateway.relay.large_bodies.worker")
_logger = logging.getLogger(__name__)
_answers = msgspec.msgpack.Decoder(Reading | Refusal)


def memory_bytes_max(fleets: int) -> int:
    """How much memory such a process may take: it has a tokenizer for each of the fleets."""
    return BODY_BYTES_MAX + fleets * TOKENIZER_BYTES_MAX


class LargeBody(NamedTuple):
    """`fleet` is the place of the one that it was read for, `fields` are those that the planner looks at, `span` is where the
    prompt's value is in the body.
    """

    fleet: int
    fields: dict[str, Any]
    known: KnownPrompt
    span: Span


class LargeBodies:
    """At most `workers` processes, each started when it is first needed. Belongs to one event loop.

    Bodies wait for one in turn, as the bytes that they are. `readers` are what reads the prompts of each fleet, with the same
    tokenizer here and there; `names` gives the names of each fleet's models where there are several. `tenants` says how many
    there are, 0 where nobody needs a key.
    """

    def __init__(
        self,
        readers: Sequence[tuple[TokenizerSource, PromptReader]],
        *,
        workers: int,
        cache_bytes_max: int,
        texts_bytes_max: int,
        tenants: Callable[[], int] = lambda: 0,
        names: Callable[[], Sequence[Sequence[str]]] | None = None,
    ) -> None:
        sources = [dataclasses.asdict(source) for source, _ in readers]
        self._setup = Setup(sources, cache_bytes_max, texts_bytes_max, memory_bytes_max(len(sources)))
        self._prompts = [prompts for _, prompts in readers]
        self._tenants = tenants
        self._names = names or (lambda: [()] * len(readers))
        self._free = asyncio.Semaphore(workers)
        self._idle: list[asyncio.subprocess.Process] = []
        self._running: set[asyncio.Task[Any]] = set()

    async def read(self, endpoint: Endpoint, raw: bytes | bytearray, tenant: str) -> LargeBody:
        """What is known of a body of a tenant, named by its salt. Raises ApiError: the client's errors, and Unavailable."""
        fleets = [_of_fleet(prompts, names) for prompts, names in zip(self._prompts, self._names(), strict=True)]
        job = Job(endpoint, tenant, self._tenants(), len(raw), fleets)
        await self._free.acquire()
        task = asyncio.create_task(self._work(job, raw))
        self._running.add(task)
        task.add_done_callback(self._done)
        answer, parts = await asyncio.shield(task)  # a client that leaves must not cost the next one a process
        if isinstance(answer, Refusal):
            told = {name: getattr(answer, name) for name in ("status", "type", "code", "param", "headers")}
            raise ApiError(answer.message, **told)
        return LargeBody(answer.fleet, answer.fields, answer.known(parts), answer.span)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        self._free.release()
        if not task.cancelled():
            task.exception()  # whoever waits for it gets it; if nobody does, it was logged

    async def _work(self, job: Job, raw: bytes | bytearray) -> tuple[Reading | Refusal, list[bytes]]:
        process = self._idle.pop() if self._idle else await self._start()
        try:
            async with asyncio.timeout(READ_SECONDS_MAX):
                answer = await _asked(process, job, raw)
        except (OSError, EOFError, msgspec.MsgspecError) as error:
            _logger.error("a process that reads large bodies is of no more use: %s: %s", type(error).__name__, error)
            _kill(process)
            raise Unavailable("The body could not be read. Send it again, or a smaller one.") from None
        except BaseException:
            _kill(process)
            raise
        self._idle.append(process)
        return answer

    async def _start(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *_WORKER,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is for the gateway, which ends its processes last
        )
        _send(process, self._setup)
        return process

    async def close(self) -> None:
        """End the processes."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        for process in self._idle:
            process.kill()
            await process.wait()
        self._idle.clear()


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        process.kill()


def _of_fleet(prompts: PromptReader, names: Sequence[str]) -> OfFleet:
    parity = prompts.parity
    return OfFleet(parity.completions.parity, parity.chat.parity, prompts.context_tokens(), list(names))


async def _asked(
    process: asyncio.subprocess.Process, job: Job, raw: bytes | bytearray
) -> tuple[Reading | Refusal, list[bytes]]:
    """The answer to a job. Raises OSError, EOFError and MsgspecError when there is none."""
    assert process.stdin is not None
    assert process.stdout is not None
    _send(process, job)
    whole = memoryview(raw)
    for start in range(0, len(whole), SLICE_BYTES):
        process.stdin.write(whole[start : start + SLICE_BYTES])
        await process.stdin.drain()
    read = process.stdout.readexactly
    answer = _answers.decode(await read(int.from_bytes(await read(LENGTH_BYTES), "little")))
    parts = [await read(size) for size in answer.ids] if isinstance(answer, Reading) else []
    return answer, parts


def _send(process: asyncio.subprocess.Process, frame: Setup | Job) -> None:
    assert process.stdin is not None
    content = msgspec.msgpack.encode(frame)
    process.stdin.write(len(content).to_bytes(LENGTH_BYTES, "little") + content)
