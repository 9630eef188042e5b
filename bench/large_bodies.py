"""What large bodies cost those who send none: `python -m bench.large_bodies --model DIR`.

A gateway over two mock replicas gets bodies near its limit, some at a time, of each kind once; meanwhile /health and a small
completion are asked for in turn. Printed are the longest of these, and how far the memory of all the gateway's processes rises.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.cases import MODEL
from bench.machine import LOAD_CORE, PROXY_CORE, Pinned, StartFailed, end_on_sigterm, free_ports
from bench.mock_replicas import write_run_dir
from bench.report import quantile

START_SECONDS_MAX = 240.0
ANSWER_SECONDS_MAX = 300.0
PAUSE_SECONDS = 0.01
SETTLE_SECONDS = 2.0
WAITED_SECONDS = 5.0
_CHAT = b'{"model":"%b","messages":[{"role":"user","content":"x"}],"max_tokens":1,' % MODEL.encode()
_TOOL = b'{"type":"function","function":{"name":"f","description":"%b"}}' % (b"d" * 200)
_TEXT = b"Each of these lines says a little of what the one before it said. "


def _filled(begin: bytes, part: bytes, end: bytes, size: int) -> bytes:
    return begin + b",".join([part] * ((size - len(begin) - len(end)) // (len(part) + 1))) + end


def _kinds(size: int) -> Mapping[str, tuple[str, Callable[[], bytes]]]:
    """Bodies of about `size` bytes by what is in them: where they go, and what makes one."""
    completion, chat = "/v1/completions", "/v1/chat/completions"
    begin = b'{"model":"%b","max_tokens":1,"prompt":' % MODEL.encode()
    return {
        "objects in an unknown field": (completion, lambda: _filled(begin + b'"x","k":[', b'{"":0}', b"]}", size)),
        "template words": (chat, lambda: _filled(_CHAT + b'"chat_template_kwargs":{"k":[', b'{"a":[1,2]}', b"]}}", size)),
        "tools": (chat, lambda: _filled(_CHAT + b'"tools":[', _TOOL, b"]}", size)),
        "messages": (chat, lambda: _filled(b'{"messages":[', b'{"role":"user","content":"x"}', b"]}", size)),
        "a text": (completion, lambda: begin + b'"' + _TEXT * (size // len(_TEXT)) + b'"}'),
        "token ids": (completion, lambda: _filled(begin + b"[", b"300", b"]}", size)),
        "a text within the limit": (completion, lambda: begin + b'"' + _TEXT * (1_500_000 // len(_TEXT)) + b'"}'),
    }


class Probe:
    """Asks the gateway for something small again and again, in a thread, and notes how long each answer took."""

    def __init__(self, port: int, method: str, path: str, body: bytes = b"") -> None:
        self.seconds: list[float] = []
        self._asked = (method, path, body or None, {"content-type": "application/json"} if body else {})
        self._line = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS_MAX)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ends.wait(PAUSE_SECONDS):
            begun = time.perf_counter()
            self._line.request(*self._asked)
            answer = self._line.getresponse()
            answer.read()
            self.seconds.append(time.perf_counter() - begun)
            if answer.status != 200:
                raise RuntimeError(f"{self._asked[1]} got {answer.status}")


@contextmanager
def _watched(gateway: Pinned) -> Iterator[list[int]]:
    """The most memory that the gateway has meanwhile, in bytes; a process may have ended while it was looked at."""
    most, ends = [gateway.resident_bytes()], threading.Event()

    def watch() -> None:
        while not ends.wait(PAUSE_SECONDS):
            try:
                most[0] = max(most[0], gateway.resident_bytes())
            except FileNotFoundError:
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        ends.set()
        thread.join()


def _send(port: int, path: str, body: bytes) -> int:
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS_MAX)
    line.request("POST", path, body, {"content-type": "application/json"})
    answer = line.getresponse()
    answer.read()
    line.close()
    return answer.status


def measure(gateway: Pinned, port: int, path: str, bodies: list[bytes]) -> dict[str, object]:
    """Send the bodies at one time, and say what that cost."""

    def send() -> str:
        with ThreadPoolExecutor(len(bodies)) as senders:
            statuses = set(senders.map(lambda body: _send(port, path, body), bodies))
        return ", ".join(map(str, sorted(statuses)))

    return _beside(gateway, port, send)


def _beside(gateway: Pinned, port: int, work: Callable[[], str]) -> dict[str, object]:
    """Figures of what else the gateway does during `work`, which says what answers there were."""
    small = json.dumps({"model": MODEL, "prompt": "a small request", "max_tokens": 1}).encode()
    before = gateway.resident_bytes()
    begun = time.perf_counter()
    with (
        Probe(port, "GET", "/health") as health,
        Probe(port, "POST", "/v1/completions", small) as request,
        _watched(gateway) as most,
    ):
        answers = work()
    return {
        "seconds": time.perf_counter() - begun,
        "answers": answers,
        "risen_mib": (most[0] - before) / (1 << 20),
        "health_p99_ms": quantile(health.seconds, 0.99) * 1e3,
        "health_longest_ms": max(health.seconds) * 1e3,
        "small_p99_ms": quantile(request.seconds, 0.99) * 1e3,
        "small_longest_ms": max(request.seconds) * 1e3,
    }


def _waited() -> str:
    time.sleep(WAITED_SECONDS)
    return "none"


def measure_heads(gateway: Pinned, port: int, count: int) -> dict[str, object]:
    """Send so many heads and no bodies, and say what that costs others for WAITED_SECONDS."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(count):
            line = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            line.sendall(head)
        return _beside(gateway, port, _waited)


def _cases(gateway: Pinned, port: int, given: argparse.Namespace) -> Mapping[str, Callable[[], dict[str, object]]]:
    """What is measured, by its name in the table."""
    cases: dict[str, Callable[[], dict[str, object]]] = {"nothing, to compare with": lambda: _beside(gateway, port, _waited)}
    for name, (path, made) in _kinds(int(given.mebibytes * (1 << 20))).items():
        cases[name] = lambda path=path, made=made: measure(gateway, port, path, [made()] * given.bodies)  # type: ignore[misc]
    cases[f"{given.heads:,} heads without bodies"] = lambda: measure_heads(gateway, port, given.heads)
    return cases


def _started(stack: ExitStack, model: str) -> tuple[Pinned, int]:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pkv-", dir="/tmp")))
    shared = stack.enter_context(tempfile.TemporaryDirectory(prefix="pkv-tables-", dir="/dev/shm"))
    *ports, port = free_ports(3)
    sockets = write_run_dir(directory / "run", Path(shared), model, os.getpid())
    argv = [sys.executable, "-m", "bench.backend", "--model", model, "--table-dir", shared]
    for each, place in zip(ports, sockets, strict=True):
        argv += ["--port", str(each), "--socket", place]
    backend = Pinned(argv, LOAD_CORE, directory / "backend.log", {})
    stack.callback(backend.end)
    env = {"PEERKV_RUN_DIR": str(directory / "run"), "PEERKV_LOG_LEVEL": "warning"}
    argv = [sys.executable, "-m", "gateway.cli", "gateway", "--host", "127.0.0.1", "--port", str(port)]
    cores = ",".join(map(str, sorted({PROXY_CORE, LOAD_CORE} & os.sched_getaffinity(0))))
    gateway = Pinned(argv, cores, directory / "gateway.log", env)
    stack.callback(gateway.end)
    deadline = time.monotonic() + START_SECONDS_MAX
    while not _is_settled(port):
        backend.check()
        gateway.check()
        if time.monotonic() > deadline:
            raise StartFailed(gateway.tail())
        time.sleep(0.1)
    time.sleep(SETTLE_SECONDS)
    return gateway, port


def _is_settled(port: int) -> bool:
    """Whether it answers and knows the engine's longest prompt: before that nothing is too long."""
    try:
        if _send(port, "/v1/completions", b'{"model":"%b","prompt":"ready?"}' % MODEL.encode()) != 200:
            return False
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/kv/stats", timeout=ANSWER_SECONDS_MAX) as stats:
            return bool(json.load(stats)["parity"]["completions"]["parity"] == "exact")
    except OSError:
        return False


def _show(name: str, found: Mapping[str, Any]) -> None:
    print(
        f"| {name} | {found['answers']} | {found['seconds']:.1f} | {found['risen_mib']:,.0f} "
        f"| {found['health_p99_ms']:.0f}, {found['health_longest_ms']:.0f} "
        f"| {found['small_p99_ms']:.0f}, {found['small_longest_ms']:.0f} |",
        flush=True,
    )


def main() -> int:
    """Measure and print a row of a Markdown table for each kind."""
    parser = argparse.ArgumentParser(prog="bench.large_bodies", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="directory with the tokenizer")
    parser.add_argument("--bodies", type=int, default=6, help="of a kind at one time (default: 6)")
    parser.add_argument("--mebibytes", type=float, default=30.0, help="of each body (default: 30)")
    parser.add_argument("--only", default="", help="kinds whose name contains this (default: all)")
    parser.add_argument("--heads", type=int, default=1024, help="without bodies, at one time (default: 1024)")
    given = parser.parse_args()
    end_on_sigterm()
    print(f"{given.bodies} bodies of {given.mebibytes:g} MiB at one time; load average before: {os.getloadavg()[0]:.1f}")
    print("| bodies | answers | s | memory, MiB more | /health p99, longest, ms | small request p99, longest, ms |")
    print("|---|---|---|---|---|---|")
    with ExitStack() as stack:
        gateway, port = _started(stack, given.model)
        for name, work in _cases(gateway, port, given).items():
            if given.only in name:
                _show(name, work())
                time.sleep(SETTLE_SECONDS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
