"""Two nodes on one machine: directories, agents and TLS of their own, each agent in a thread with its own event loop."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from engine.node.agent import Agent
from engine.node.settings import NodeSettings, Peer
from tests.unit.waiting import DEADLINE_SECONDS
from transport.node.keys import make_keys
from transport.node.nixl.ability import Choice


def free_port() -> int:
    """Return a port that is free together with the next one."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = int(first.getsockname()[1])
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except OSError:
                continue
        return port


class Node:
    """A node: `tables` and `run` are its directories."""

    def __init__(self, path: Path, name: str, port: int, keys: Path | None) -> None:
        self.name, self.port, self.keys = name, port, keys
        self.tables, self.run = path / name / "tables", path / name / "run"
        for each in (self.tables, self.run):
            each.mkdir(mode=0o700, parents=True)
        self.agent: Agent | None = None
        self._stop: Callable[[], None] = lambda: None
        self._thread: threading.Thread | None = None
        self._stopped = False

    @property
    def peer(self) -> Peer:
        return Peer(self.name, "127.0.0.1", self.port)

    def start(self, *peers: Peer, join: str = "", staging_bytes: int = 16 << 20, transport: Choice = "auto") -> None:
        """Start its agent."""
        self._stopped = False
        settings = NodeSettings(
            self.name, "127.0.0.1", self.port, str(self.tables), str(self.run), str(self.keys or ""), peers, join,
            staging_bytes, "test", transport,
        )  # fmt: skip
        ready = threading.Event()

        async def run() -> None:
            self.agent = Agent(settings)
            task, loop = asyncio.current_task(), asyncio.get_running_loop()
            assert task is not None
            self._stop = lambda: loop.call_soon_threadsafe(task.cancel)
            loop.call_later(0.01, ready.set)
            await self.agent.run()

        def thread() -> None:
            try:
                asyncio.run(run())
            except asyncio.CancelledError:  # by `stop`: an agent has no other end
                assert self._stopped
            finally:
                ready.set()

        self._thread = threading.Thread(target=thread, daemon=True)
        self._thread.start()
        assert ready.wait(DEADLINE_SECONDS)

    def stop(self) -> None:
        """End its agent."""
        if self._thread is not None:
            self._stopped = True
            self._stop()
            self._thread.join(DEADLINE_SECONDS)
            assert not self._thread.is_alive()
            self._thread = None


@contextmanager
def nodes(path: Path, *names: str, keys: bool = True) -> Iterator[list[Node]]:
    """Nodes that are not started yet; they end with the context."""
    made = make_keys(path / "keys", list(names)) if keys else [None] * len(names)
    found = [Node(path, name, free_port(), own) for name, own in zip(names, made, strict=True)]
    with mock.patch("engine.node.agent.HOLD_SECONDS", 0.0):  # what a test sees in a directory, the agent sees too
        try:
            yield found
        finally:
            for node in found:
                node.stop()
