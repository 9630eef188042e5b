"""A stand-in for vLLM's engine core, a process behind `fake_engine.py`: it makes the steps, and tells of them in a table.

It reads a line for a request's step, `<number> <tag> <prompt tokens>`, answers `<number>`, and takes `-<number>` as its end.
`<number> <tag>` is a request that arrives and is given no step.
Stopped (SIGSTOP), it leaves a server that answers /health and gives no token.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK_TOKENS, BLOCKS = 16, 64


class CoreLink:
    """The server's end."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, vllm_arguments: Sequence[str]) -> CoreLink:
        """Start the core of the replica that `--kv-transfer-config` names, and wait for its table."""
        config = json.loads(vllm_arguments[list(vllm_arguments).index("--kv-transfer-config") + 1])
        told = config["kv_connector_extra_config"]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, told["table_dir"], told["replica"]),
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        await process.stdout.readline()
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self) -> int:
        """A request's number."""
        return next(self._numbers)

    async def step(self, number: int, tag: int, prompt_tokens: int) -> None:
        """Wait until the core has made a step for the request."""
        done = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._tell(f"{number} {tag} {prompt_tokens}")
        await done

    def wait(self, number: int, tag: int) -> None:
        """Have a request arrive that the core gives no step."""
        self._tell(f"{number} {tag}")

    def end(self, number: int) -> None:
        self._waiting.pop(number, None)
        self._tell(f"-{number}")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            done = self._waiting.pop(int(line), None)
            if done is not None and not done.done():
                done.set_result(None)
        os._exit(9)  # as vLLM's server ends without its engine


def main() -> None:
    from transport.table.deliveries import Delivery
    from transport.table.layout import Description
    from transport.table.writer import TableWriter

    table_dir, name = Path(sys.argv[1]), sys.argv[2]
    fields: dict[str, Any] = {"weights": "fake"}
    about = Description(name, os.getpid(), "xxh3_128", "shared_memory", "ok", fields, ())
    table = TableWriter(table_dir, about, BLOCK_TOKENS, BLOCKS)
    print("ready", flush=True)
    running: set[int] = set()
    waiting = 0
    for line in sys.stdin:
        words = [int(word) for word in line.split()]
        if words[0] < 0:
            running.discard(-words[0])
        elif len(words) == 2:
            table.waiting.add(words[1])
            waiting += 1
            words[0] = 0
        elif words[0] not in running:
            running.add(words[0])
            now_ns = time.monotonic_ns()
            if words[1]:
                told = Delivery(words[1], now_ns, now_ns, now_ns, now_ns, words[2], 0, 0, words[2])
                table.deliver(told, "shared_memory")
        table.beat(time.monotonic_ns())
        table.tell_load([waiting, len(running), 0, len(running)])
        if words[0] > 0:
            print(words[0], flush=True)
    table.close()


if __name__ == "__main__":
    main()
