"""Several hosts on one machine: network namespaces on a virtual switch, in each a real `peerkv serve` with one replica.

Needs root, for the namespaces.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.joined_fleet import read_nodes
from tests.real.fleet import ANSWER_SECONDS_MAX, MARK, ROOT, STOP_SECONDS_MAX, until
from tests.real.leftovers import marked_processes
from transport.node.keys import make_keys

START_SECONDS_MAX = 600.0
PORT, AGENT_PORT = 8000, 7710
NAMES = ("node-a", "node-b", "node-c")
PATH = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
STARTS = ("apples", "bread", "cider", "dates", "eggs", "figs", "grapes", "honey", "ice", "jam", "kale", "lemons")
CACHE = re.compile(r'(\w+)="?([\w:.-]+)"?')


@dataclass(frozen=True)
class Answered:
    """A completion: who answered, where its prompt came from, its tokens' ids and log-probabilities, the seconds to its end."""

    replica: str
    cache: dict[str, str]
    text: str
    ids: tuple[str, ...]
    logprobs: tuple[float, ...]
    seconds: float
    request_id: str

    def tokens(self, source: str) -> int:
        """Prompt tokens that came from `local`, `peer` or `computed`."""
        return int(self.cache.get(source, 0))


def ip(*words: str) -> None:
    """Run ip(8)."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass(frozen=True)
class Served:
    """What hosts serve: vLLM's options go behind `--`, `flags` before."""

    model: str = ""
    name: str = "SmolLM2-135M-Instruct"
    flags: tuple[str, ...] = ()
    vllm_args: tuple[str, ...] = ("--dtype", "float32")


@dataclass(frozen=True)
class Clocks:
    """How far a host's clocks are ahead of the machine's, seconds: CLOCK_MONOTONIC, and Python's time.time."""

    monotonic: int = 0
    wall: int = 0


TRUE = Clocks()
AHEAD = """import time
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + {0}
time.time_ns = lambda: _time_ns() + {0} * 10**9
"""


class Host:
    """One of them, with the address 10.79.0.`number`."""

    def __init__(self, home: Path, number: int, network: str, keys: Path, served: Served, clocks: Clocks = TRUE) -> None:
        self.name = NAMES[number - 1]
        self.served, self.clocks = served, clocks
        self.space = f"{network}-{number}"
        self.cable = f"{network}v{number}"
        self.address = f"10.79.0.{number}"
        self.home = home / self.name
        self.keys = keys
        self.run_dir, self.log_dir = self.home / "run", self.home / "logs"
        self.table_dir = Path(f"/dev/shm/peerkv-{os.getuid()}/{network}-{number}")
        self.mark = uuid.uuid4().hex
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, others: Sequence["Host"], join: str = "") -> None:
        """Start peerkv, which finds the others at `join` or, without that, knows them; returns at once."""
        self.home.mkdir(parents=True, exist_ok=True)
        command = ["ip", "netns", "exec", self.space]
        if self.clocks.monotonic:
            ahead = str(self.clocks.monotonic)
            command += ["unshare", "--time", "--monotonic", ahead, "--boottime", ahead]
        command += [sys.executable, "-m", "gateway.cli", "serve", *([self.served.model] if self.served.model else [])]
        command += ["--served-model-name", self.served.name, "--replicas", "1", "--port", str(PORT)]
        command += ["--run-dir", str(self.run_dir), "--table-dir", str(self.table_dir)]
        command += ["--log-dir", str(self.log_dir), "--node-name", self.name, "--node-keys", str(self.keys)]
        command += ["--node-address", f"{self.address}:{AGENT_PORT}"]
        if not join:
            command += ["--node-peers", " ".join(f"{other.name}={other.address}:{AGENT_PORT}" for other in others)]
        command += ["--host-memory", "0", *self.served.flags, "--", *self.served.vllm_args]
        with (self.home / "peerkv.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.home, env=self._environment(join), stdout=log, stderr=log)

    def _environment(self, join: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PEERKV_")}
        path = PATH
        if self.clocks.wall:
            (self.home / "sitecustomize.py").write_text(AHEAD.format(self.clocks.wall))
            path = os.pathsep.join((str(self.home), PATH))
        more = {MARK: self.mark, "PYTHONPATH": path, "PEERKV_DRAIN_SECONDS": "1"}
        return kept | more | ({"PEERKV_JOIN": join} if join else {})

    def get(self, path: str) -> Any:
        """What the gateway here answers, None if it does not."""
        done = self._curl(path)
        try:
            return json.loads(done.stdout)
        except ValueError:
            return None

    def flush(self) -> Any:
        """What POST /kv/flush answers here."""
        return json.loads(self._curl("/kv/flush", "-X", "POST").stdout)

    def keep(self, prompt: str, replicas: int) -> Any:
        """What POST /kv/prefixes answers here: a prompt pinned on so many replicas."""
        body = json.dumps({"text": prompt, "replicas": replicas})
        return json.loads(self._curl("/kv/prefixes", "-d", body, "-H", "Content-Type: application/json").stdout)

    def ask(self, prompt: str, replica: str = "", max_tokens: int = 8, seconds: float = ANSWER_SECONDS_MAX) -> Answered:
        """Complete a prompt through the gateway here. Raises AssertionError for anything but an answer, in `seconds`."""
        body = {"model": self.served.name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"logprobs": 1, "return_tokens_as_token_ids": True}
        flags = ["-i", "-d", json.dumps(body), "-H", "Content-Type: application/json"]
        flags += ["-H", f"x-peerkv-replica: {replica}"] if replica else []
        begun = time.monotonic()
        done = self._curl("/v1/completions", *flags, seconds=seconds)
        taken = time.monotonic() - begun
        head, _, content = done.stdout.replace("\r", "").partition("\n\n")
        assert head.startswith("HTTP/1.1 200"), f"after {taken:.1f} s: {done.stdout[:2000]}{self.logs()}"
        fields = dict(line.split(": ", 1) for line in head.splitlines()[1:] if ": " in line)
        cache = dict(CACHE.findall(fields.get("x-peerkv-cache", "")))
        choice = json.loads(content)["choices"][0]
        told = choice["logprobs"]
        answered = tuple(told["tokens"]), tuple(told["token_logprobs"])
        return Answered(fields["x-peerkv-replica"], cache, choice["text"], *answered, taken, fields["x-request-id"])

    def _curl(self, path: str, *flags: str, seconds: float = ANSWER_SECONDS_MAX) -> "subprocess.CompletedProcess[str]":
        command = ["ip", "netns", "exec", self.space, "curl", "-s", "--max-time", str(seconds), *flags]
        return subprocess.run([*command, f"http://127.0.0.1:{PORT}{path}"], capture_output=True, text=True, check=False)

    def doctor(self) -> str:
        """What `peerkv doctor` says here."""
        command = ["ip", "netns", "exec", self.space, sys.executable, "-m", "gateway.cli", "doctor", "--quick", "--run-dir"]
        environment = os.environ | {"PYTHONPATH": PATH}
        return subprocess.run(
            [*command, str(self.run_dir)], cwd=self.home, env=environment, capture_output=True, text=True, check=False
        ).stdout

    def replicas(self) -> set[str]:
        """The ready replicas that the gateway here knows."""
        ready = self.get("/ready")
        return {replica["name"] for replica in ready["replicas"] if replica["ready"]} if ready else set()

    def agent_pid(self) -> int:
        """The node's agent, 0 if there is none now."""
        for pid in marked_processes(MARK, self.mark):
            with suppress(OSError):
                if b"engine.node" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return 0

    def engine_pid(self) -> int:
        """The process that computes."""
        found = next(replica for replica in json.loads((self.run_dir / "fleet.json").read_bytes())["replicas"])
        return int(found["pid"])

    def trouble(self) -> str:
        """Why other nodes are not heard; "" if all are."""
        nodes = read_nodes(self.run_dir).nodes
        return "; ".join(node.trouble for node in nodes if node.trouble) if nodes else "there is no agent"

    def hears(self, count: int) -> bool:
        """Whether it serves, and knows `count` ready replicas on as many nodes. Raises AssertionError if it has ended."""
        assert self.process is None or self.process.poll() is None, f"{self.name} ended{self.logs()}"
        return not self.trouble() and len(self.replicas()) == count

    def stop(self) -> None:
        """End it."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS_MAX)
        for pid in marked_processes(MARK, self.mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def logs(self) -> str:
        """The ends of the logs."""
        parts = []
        for path in (self.home / "peerkv.log", self.log_dir / "node.log", self.log_dir / "replica-0.log"):
            text = path.read_text(errors="replace") if path.exists() else ""
            parts.append(f"\n--- {self.name} {path.name}\n" + "\n".join(line[:300] for line in text.splitlines()[-20:]))
        return "".join(parts)


@contextmanager
def running_hosts(count: int, *flags: str, served: Served = Served(), clocks: Sequence[Clocks] = ()) -> Iterator[list[Host]]:
    """Hosts that serve and know each other, with more `flags`."""
    with joined_hosts(count, replace(served, flags=served.flags + flags), clocks) as hosts:
        for host in hosts:
            host.start([other for other in hosts if other is not host])
        together(hosts, START_SECONDS_MAX)
        yield hosts


def together(hosts: Sequence[Host], seconds: float) -> None:
    """Wait until each hears all the others."""
    for host in hosts:
        until(
            lambda host=host: host.hears(len(hosts)),  # type: ignore[misc]
            seconds,
            f"all replicas at {host.name}",
            0.2,
        )


@contextmanager
def joined_hosts(count: int, served: Served, clocks: Sequence[Clocks] = ()) -> Iterator[list[Host]]:
    """Hosts on one switch, not started yet."""
    network = f"pk{os.getpid() % 100000}"
    home = Path(tempfile.mkdtemp(prefix="peerkv-hosts-"))
    keys = make_keys(home / "keys", NAMES[:count])
    clocks = clocks or [TRUE] * count
    hosts = [Host(home, number + 1, network, keys[number], served, clocks[number]) for number in range(count)]
    switch = f"{network}-0"
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        for host in hosts:
            ip("netns", "add", host.space)
            ip("link", "add", host.cable, "netns", host.space, "type", "veth", "peer", "name", host.cable, "netns", switch)
            ip("-n", switch, "link", "set", host.cable, "master", "switch", "up")
            ip("-n", host.space, "addr", "add", f"{host.address}/24", "dev", host.cable)
            ip("-n", host.space, "link", "set", "lo", "up")
            ip("-n", host.space, "link", "set", host.cable, "up")
        yield hosts
    finally:
        for host in hosts:
            host.stop()
        for space in (*(host.space for host in hosts), switch):
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", space)
        for host in hosts:
            shutil.rmtree(host.table_dir, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)


def prompt(seed: object, items: int) -> str:
    """A prompt of about 8.5 tokens an item, that no other begins with: not even one of the same seed, if a test runs again."""
    made = " ".join(random.choices(STARTS, k=6))
    return f"{made}: list {seed}. " + " ".join(f"Item {number} of list {seed} is blue." for number in range(items))
