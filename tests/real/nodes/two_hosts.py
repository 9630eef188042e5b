"""Two hosts on one machine: network namespaces joined by a virtual cable, in each a real `peerkv serve` with one replica.

Needs root, for the namespaces. `python -m tests.real.nodes.two_hosts` measures first tokens of imports over 1 and 10 Gbit/s.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.joined_fleet import read_nodes
from tests.real.fleet import MARK, ROOT, STOP_SECONDS_MAX, until
from tests.real.leftovers import marked_processes
from transport.node.keys import make_keys

START_SECONDS_MAX = 600.0
ANSWER_SECONDS_MAX = 180
PORT, AGENT_PORT = 8000, 7710
PATH = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
CACHE = re.compile(r'(\w+)="?([\w:.-]+)"?')


@dataclass(frozen=True)
class Answered:
    """A completion: who answered, where its prompt came from, its text, and the seconds to its end."""

    replica: str
    cache: dict[str, str]
    text: str
    seconds: float

    def tokens(self, source: str) -> int:
        """Prompt tokens that came from `local`, `peer` or `computed`."""
        return int(self.cache.get(source, 0))


def ip(*words: str) -> None:
    """Run ip(8)."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Host:
    """One of the two, with the address 10.79.0.`number`."""

    def __init__(self, home: Path, number: int, network: str, keys: Path) -> None:
        self.name = f"node-{'ab'[number - 1]}"
        self.space = f"{network}-{number}"
        self.cable = f"{network}v{number}"
        self.address = f"10.79.0.{number}"
        self.home = home / self.name
        self.keys = keys
        self.run_dir, self.log_dir = self.home / "run", self.home / "logs"
        self.table_dir = Path(f"/dev/shm/peerkv-{os.getuid()}/{network}-{number}")
        self.mark = uuid.uuid4().hex
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, other: "Host", *flags: str) -> None:
        """Start peerkv; returns at once."""
        self.home.mkdir(parents=True, exist_ok=True)
        command = ["ip", "netns", "exec", self.space, sys.executable, "-m", "gateway.cli", "serve", "--replicas", "1"]
        command += ["--port", str(PORT), "--run-dir", str(self.run_dir), "--table-dir", str(self.table_dir)]
        command += ["--log-dir", str(self.log_dir), "--node-name", self.name, "--node-keys", str(self.keys)]
        command += ["--node-address", f"{self.address}:{AGENT_PORT}"]
        command += ["--node-peers", f"{other.name}={other.address}:{AGENT_PORT}", *flags, "--", "--dtype", "float32"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PEERKV_")}
        environment |= {MARK: self.mark, "PYTHONPATH": PATH, "PEERKV_DRAIN_SECONDS": "1"}
        with (self.home / "peerkv.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.home, env=environment, stdout=log, stderr=log)

    def get(self, path: str) -> Any:
        """What the gateway here answers, None if it does not."""
        done = self._curl(path)
        try:
            return json.loads(done.stdout)
        except ValueError:
            return None

    def ask(self, prompt: str, replica: str = "", max_tokens: int = 8) -> Answered:
        """Complete a prompt through the gateway here. Raises AssertionError for anything but an answer."""
        body = {"model": "SmolLM2-135M-Instruct", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        flags = ["-i", "-d", json.dumps(body), "-H", "Content-Type: application/json"]
        flags += ["-H", f"x-peerkv-replica: {replica}"] if replica else []
        begun = time.monotonic()
        done = self._curl("/v1/completions", *flags)
        seconds = time.monotonic() - begun
        head, _, content = done.stdout.replace("\r", "").partition("\n\n")
        assert head.startswith("HTTP/1.1 200"), done.stdout[:2000] + self.logs()
        fields = dict(line.split(": ", 1) for line in head.splitlines()[1:] if ": " in line)
        cache = dict(CACHE.findall(fields.get("x-peerkv-cache", "")))
        return Answered(fields["x-peerkv-replica"], cache, json.loads(content)["choices"][0]["text"], seconds)

    def _curl(self, path: str, *flags: str) -> "subprocess.CompletedProcess[str]":
        command = ["ip", "netns", "exec", self.space, "curl", "-s", "--max-time", str(ANSWER_SECONDS_MAX), *flags]
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
        """Why the other node is not heard; "" if it is."""
        nodes = read_nodes(self.run_dir).nodes
        return nodes[0].trouble if nodes else "there is no agent"

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
def two_hosts(*flags: str) -> Iterator[tuple[Host, Host]]:
    """Two hosts that serve and know each other."""
    network = f"pk{os.getpid() % 100000}"
    home = Path(tempfile.mkdtemp(prefix="peerkv-hosts-"))
    keys = make_keys(home / "keys", ["node-a", "node-b"])
    one, other = (Host(home, number, network, own) for number, own in zip((1, 2), keys, strict=True))
    try:
        for host in (one, other):
            ip("netns", "add", host.space)
        ip("link", "add", one.cable, "netns", one.space, "type", "veth", "peer", "name", other.cable, "netns", other.space)
        for host in (one, other):
            ip("-n", host.space, "addr", "add", f"{host.address}/24", "dev", host.cable)
            ip("-n", host.space, "link", "set", "lo", "up")
            ip("-n", host.space, "link", "set", host.cable, "up")
        one.start(other, *flags)
        other.start(one, *flags)
        for host in (one, other):
            until(lambda host=host: len(host.replicas()) == 2, START_SECONDS_MAX, f"two replicas at {host.name}", 0.5)
        yield one, other
    finally:
        for host in (one, other):
            host.stop()
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", host.space)
            shutil.rmtree(host.table_dir, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)


def prompt(seed: object, items: int) -> str:
    """A prompt of about 8.5 tokens an item, that no other seed begins with."""
    return f"List {seed}. " + " ".join(f"Item {number} of list {seed} is blue." for number in range(items))


def limit(host: Host, rate: str) -> None:
    """Let a host send at most so much, such as 1gbit."""
    shape = ["root", "tbf", "rate", rate, "burst", "1mb", "latency", "50ms"]
    subprocess.run(["tc", "-n", host.space, "qdisc", "replace", "dev", host.cable, *shape], check=True)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=[100, 200])
    parser.add_argument("--rates", nargs="+", default=["1gbit", "10gbit"])
    parser.add_argument("--samples", type=int, default=5)
    given = parser.parse_args()
    with two_hosts() as (one, other):
        print("seconds to one token, medians: computed, imported from the other node, local hit")
        for rate in given.rates:
            for host in (one, other):
                limit(host, rate)
            for items in given.items:
                rows: list[tuple[float, float, float]] = []
                tokens = 0
                for sample in range(given.samples):
                    text = prompt(f"{rate} {items} {sample}", items)
                    cold = one.ask(text, "replica-0", 1)
                    imported = other.ask(text, "replica-0", 1)
                    local = other.ask(text, "replica-0", 1)
                    assert imported.tokens("peer"), imported
                    tokens = imported.tokens("peer")
                    rows.append((cold.seconds, imported.seconds, local.seconds))
                medians = " ".join(f"{statistics.median(column):8.3f}" for column in zip(*rows, strict=True))
                print(f"{rate:>7} {tokens:6} tokens imported {medians}", flush=True)


if __name__ == "__main__":
    main()
