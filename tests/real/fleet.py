"""A real `peerkv serve` in a process of its own: vLLM on the CPU, the default model, a free loopback port."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from engine.fleet import FileFleet
from tests.real.leftovers import marked_processes
from transport.table.reader import SUFFIX, TableReader

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS_MAX = 900.0  # the first start on a machine fetches and converts the model
RESTART_SECONDS_MAX = 180.0
ANSWER_SECONDS_MAX = 180.0
STOP_SECONDS_MAX = 60.0
LOG_LINES_SHOWN = 30
LOG_LINE_CHARS_SHOWN = 300
SALT_SECRET = "what salts are made with in tests"
MARK = "REAL_FLEET_MARK"  # in the environment of every process of a fleet; replicas get no PEERKV_* variables
REPLICAS = ("replica-0", "replica-1")
NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True)
class Answer:
    """One completion. `tokens` are ids, `logprobs` belong to them."""

    replica: str
    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int

    def same_as(self, other: "Answer") -> bool:
        """Whether tokens and logprobs are the same to the last bit."""
        return (self.tokens, self.logprobs) == (other.tokens, other.logprobs)

    def close_to(self, other: "Answer", logprob_max: float = 1e-3) -> bool:
        """Whether the tokens are the same and no logprob differs by more than `logprob_max`."""
        pairs = zip(self.logprobs, other.logprobs, strict=True) if self.tokens == other.tokens else [(0.0, float("inf"))]
        return all(abs(ours - theirs) <= logprob_max for ours, theirs in pairs)


@dataclass
class Counted:
    """How many prompt tokens of a replica came from where, and its other counters, while something was done."""

    prompt: int = 0
    local: int = 0
    peer: int = 0
    computed: int = 0
    counts: dict[str, Any] = field(default_factory=dict)


def until(condition: Callable[[], bool], seconds: float, what: str, poll_seconds: float = 0.05) -> None:
    """Wait for `condition`, at most `seconds`. Raises AssertionError that names `what`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(poll_seconds)


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Fleet:
    """`config` is the TOML of the settings, `flags` go before `--` on the command line and `vllm_args` behind it; requests
    have the API key `key`. `environment` is added to that of all processes; there will be so many `replicas`. There is no host
    memory if neither config nor flags ask for it, and with [[models]] what the tables of these say."""

    def __init__(
        self,
        config: str = "",
        flags: tuple[str, ...] = (),
        vllm_args: tuple[str, ...] = (),
        key: str = "",
        environment: Mapping[str, str] = NOTHING,
        replicas: int = len(REPLICAS),
    ) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="peerkv-real-"))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.mark = uuid.uuid4().hex
        self.run_dir = self.home / "run"
        self.table_dir = Path(f"/dev/shm/peerkv-{os.getuid()}/{self.port}")
        self.log_dir = self.home / "logs"
        self.key = key
        self.environment = {**environment, MARK: self.mark, "PYTHONPATH": str(ROOT)}
        self._replicas = replicas
        self._fleet = FileFleet(self.run_dir)
        (self.home / "salt-secret").write_text(SALT_SECRET)
        memory = "" if "host_memory" in config or "[[models]]" in config or "--host-memory" in flags else "host_memory = 0\n"
        (self.home / "peerkv.toml").write_text(f'salt_secret_file = "{self.home}/salt-secret"\n{memory}{config}')
        self.command = [sys.executable, "-m", "gateway.cli", "serve", "--port", str(self.port)]
        self.command += ["--config", str(self.home / "peerkv.toml")]
        self.command += ["--run-dir", str(self.run_dir), "--log-dir", str(self.log_dir), *flags]
        self.command += ["--", *vllm_args] if vllm_args else []
        self.process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(base_url=self.url, timeout=ANSWER_SECONDS_MAX, limits=httpx.Limits(max_connections=None))

    # Its life

    def start(self) -> None:
        """Start it; returns at once."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PEERKV_")}
        kept = {name: os.environ[name] for name in ("PEERKV_CACHE",) if name in os.environ}
        environment |= kept | self.environment
        with (self.home / "peerkv.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.home, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait_ready(self, seconds: float = START_SECONDS_MAX) -> None:
        """Wait until every replica serves and their block tables are there."""
        until(self._is_ready, seconds, "all replicas are ready", poll_seconds=0.1)

    def _is_ready(self) -> bool:
        assert self.process is None or self.process.poll() is None, f"peerkv ended with status {self.process.returncode}"
        try:
            answer = self.client.get("/ready").json()
            ready = answer["ready"] and all(replica["ready"] for replica in answer["replicas"])
        except (httpx.TransportError, KeyError, ValueError):
            return False
        return bool(ready) and len(answer["replicas"]) == self._replicas and self._settled()

    def _settled(self) -> bool:
        stats = self.stats()
        return stats["parity"]["completions"]["parity"] != "unknown" and all(r["blocks"] for r in stats["replicas"])

    def stop(self) -> int | None:
        """End it as Ctrl-C would, by force if need be; returns the exit status."""
        self.client.close()
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(STOP_SECONDS_MAX)
        finally:
            for pid in marked_processes(MARK, self.mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)

    def remove(self) -> None:
        """Remove its files."""
        shutil.rmtree(self.home, ignore_errors=True)

    def logs(self) -> str:
        """The last lines of every log, for people."""
        parts = []
        for path in [self.home / "peerkv.log", *sorted(self.log_dir.glob("*.log"))]:
            text = path.read_text(errors="replace") if path.exists() else "(absent)"
            lines = [line[:LOG_LINE_CHARS_SHOWN] for line in text.splitlines() if "Route: /" not in line]
            parts.append(f"--- {path.name}, its last lines\n" + "\n".join(lines[-LOG_LINES_SHOWN:]))
        return "\n".join(parts)

    # What it says of itself

    @property
    def model(self) -> str:
        """The name that clients use."""
        return self._fleet.snapshot().served_model_name

    @property
    def model_dir(self) -> Path:
        """Where the model's files lie."""
        return Path(self._fleet.snapshot().model)

    def pid(self, replica: str) -> int:
        """The process that serves as `replica` now."""
        found = self._fleet.snapshot().find(replica)
        assert found is not None
        assert found.pid is not None
        return found.pid

    def restarted(self, replica: str, former: int) -> bool:
        """Whether another process than `former` serves, or is about to serve, as `replica`."""
        found = self._fleet.snapshot().find(replica)
        return found is not None and found.pid not in (None, former)

    def kill(self, replica: str) -> None:
        """kill -9, and wait until the supervisor has started another in its place."""
        former = self.pid(replica)
        os.kill(former, signal.SIGKILL)
        until(lambda: self.restarted(replica, former), RESTART_SECONDS_MAX, f"{replica} is started anew")

    def stats(self) -> dict[str, Any]:
        """/kv/stats."""
        stats: dict[str, Any] = self.client.get("/kv/stats").raise_for_status().json()
        return stats

    def replica_stats(self, replica: str) -> dict[str, Any]:
        """What /kv/stats says of one replica."""
        return next(found for found in self.stats()["replicas"] if found["name"] == replica)

    @contextlib.contextmanager
    def counting(self, replica: str) -> Iterator[Counted]:
        """Count what `replica` does inside the block; the result is filled in at its end."""
        before, counted = self.replica_stats(replica), Counted()
        yield counted
        after = self.replica_stats(replica)
        moved = {name: after["tokens"][name] - before["tokens"][name] for name in before["tokens"]}
        counted.prompt, counted.local, counted.computed = moved["prompt"], moved["local"], moved["computed"]
        counted.peer = moved["peer_shared_memory"] + moved["peer_cuda_ipc"]
        counted.counts = {name: after["counts"][name] - before["counts"][name] for name in before["counts"]}

    def table(self, replica: str) -> TableReader:
        """Its block table, for the caller to close."""
        return TableReader(self.table_dir / (replica + SUFFIX))

    # Asking it

    def answer(self, prompt: str | list[int], *, replica: str | None = None, key: str = "", **more: Any) -> Answer:
        """A greedy completion through the gateway, on `replica` if given."""
        headers = self.headers(key) | ({"x-peerkv-replica": replica} if replica else {})
        response = self.client.post("/v1/completions", json=self.body(prompt, **more), headers=headers)
        return answer_of(response)

    def direct(self, replica: str, prompt: str | list[int], **more: Any) -> Answer:
        """A greedy completion from a replica's own socket, past the gateway."""
        with self.socket_client(replica) as client:
            return answer_of(client.post("/v1/completions", json=self.body(prompt, **more)))

    @contextlib.contextmanager
    def decoding(self, prompts: list[str], replica: str) -> Iterator[list[Iterator[str]]]:
        """Keep `replica` busy with an endless answer to each of `prompts`; yields the lines of their streams."""
        with contextlib.ExitStack() as streams:
            lines = []
            for prompt in prompts:
                body = self.body(prompt, max_tokens=4000, stream=True, logprobs=None)
                pinned = self.headers() | {"x-peerkv-replica": replica}
                answer = streams.enter_context(self.client.stream("POST", "/v1/completions", json=body, headers=pinned))
                lines.append(answer.iter_lines())
                next(lines[-1])
            yield lines

    def body(self, prompt: str | list[int], **more: Any) -> dict[str, Any]:
        """The body of a greedy completion of 12 tokens with logprobs."""
        fixed = {"model": self.model, "prompt": prompt, "temperature": 0, "max_tokens": 12, "logprobs": 1}
        return fixed | {"ignore_eos": True, "return_tokens_as_token_ids": True} | more

    def headers(self, key: str = "") -> dict[str, str]:
        """The header that authenticates, as the default tenant if no key is given."""
        return {"authorization": f"Bearer {key or self.key}"} if key or self.key else {}

    def socket_client(self, replica: str) -> httpx.Client:
        """A client of a replica's own socket."""
        transport = httpx.HTTPTransport(uds=str(self.run_dir / f"{replica}.sock"))
        return httpx.Client(transport=transport, base_url="http://replica", timeout=ANSWER_SECONDS_MAX)

    def forget(self, *replicas: str) -> None:
        """Empty the prefix caches of these replicas."""
        for replica in replicas:
            with self.socket_client(replica) as client:
                answer = client.post("/reset_prefix_cache", params={"reset_external": "true"})
                answer.raise_for_status()

    def flush(self) -> None:
        """Empty every prefix cache, through the gateway."""
        self.client.post("/kv/flush").raise_for_status()


def answer_of(response: httpx.Response) -> Answer:
    """What a completion says."""
    assert response.status_code == 200, response.text
    body = response.json()
    choice, usage = body["choices"][0], body["usage"]
    logprobs = choice["logprobs"] or {"tokens": [], "token_logprobs": []}
    return Answer(
        response.headers.get("x-peerkv-replica", ""),
        choice["text"],
        tuple(logprobs["tokens"]),
        tuple(logprobs["token_logprobs"]),
        usage["prompt_tokens"],
        (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
    )
