"""How old what a gateway's index knows of another node is, while that node's tables change all the time.

    python -m bench.node_changes

Two agents in processes of their own, over loopback with TLS. node-a has some tables, in each of which so many blocks are
published a second; node-b's index follows its mirrors of them, and an index beside them follows node-a's own tables.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from engine.node.settings import NodeSettings, Peer
from gateway.block_registry.holder_index import HolderIndex
from gateway.block_registry.table_feed import TableFeed
from tests.unit.engine.node.two_nodes import free_port
from tests.unit.transport.table_fixtures import writer
from transport.keys import Keys, chain_keys, root_key
from transport.node.keys import make_keys
from transport.table.directory import TableDirectory
from transport.table.writer import TableWriter

ROOT = Path(__file__).resolve().parents[1]
BLOCKS, ROUNDS_A_SECOND = 4096, 50
START_SECONDS_MAX = 60.0
TICKS = os.sysconf("SC_CLK_TCK")


class Table:
    """A table in which the next blocks, round and round, are published under keys that were never there."""

    def __init__(self, path: Path, number: int, rounds: int, each: int) -> None:
        self.name = f"replica-{number}"
        self.keys: Keys = chain_keys(root_key(self.name.encode().ljust(16)), range(rounds * each), 1)
        self.writer: TableWriter = writer(path, self.name, BLOCKS)
        self._each, self._next = each, 0

    def publish(self) -> int:
        """Publish a round; return the first word of its last key."""
        begin, self._next = self._next, self._next + self._each
        ids = [number % BLOCKS for number in range(begin, self._next)]
        self.writer.invalidate(ids)
        self.writer.publish(ids, self.keys[begin : self._next])
        return int(self.keys[self._next - 1, 0])


class Index:
    """What a gateway knows of the tables in a directory."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._directory, self._prefix = TableDirectory(path), prefix
        self._index = HolderIndex()
        self._feed = TableFeed(self._index)
        self.waiting: dict[int, tuple[str, float]] = {}
        self.ages: list[float] = []

    def look(self) -> None:
        """Take in what changed, and note how old what was waited for is."""
        self._feed.follow({name: table for name, table in self._directory.tables().items() if name.startswith(self._prefix)})
        self._feed.refresh()
        now = time.monotonic()
        for low, (name, published) in list(self.waiting.items()):
            if self._index.held(self._feed.place(f"{self._prefix}{name}"), low):
                del self.waiting[low]
                self.ages.append(now - published)

    @property
    def tables(self) -> int:
        """How many it has in whole."""
        return self._feed.whole.bit_count()


@contextmanager
def agents(home: Path) -> Iterator[dict[str, tuple[Path, int]]]:
    """Run two; yields the directory of each one's tables, and its process."""
    names = ("node-a", "node-b")
    peers = {name: Peer(name, "127.0.0.1", free_port()) for name in names}
    keys = dict(zip(names, make_keys(home / "keys", list(names)), strict=True))
    with ExitStack() as stack:
        found = {}
        for name, peer in peers.items():
            tables, run = home / name / "tables", home / name / "run"
            for path in (tables, run):
                path.mkdir(mode=0o700, parents=True)
            others = tuple(other for other in peers.values() if other is not peer)
            settings = NodeSettings(name, peer.host, peer.port, str(tables), str(run), str(keys[name]), others)
            log = stack.enter_context((home / f"{name}.log").open("wb"))
            process = subprocess.Popen([sys.executable, "-m", "engine.node"], cwd=ROOT, stdin=subprocess.PIPE, stderr=log)
            stack.callback(process.wait, 10)
            stack.callback(process.terminate)
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(settings) + b"\n")
            process.stdin.flush()
            found[name] = tables, process.pid
        yield found


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def measure(tables: int, changes: int, seconds: float) -> dict[str, Any]:
    """Return ages in ms and CPU shares, with so many `tables` and changes a second in all."""
    each, rounds = max(1, changes // tables // ROUNDS_A_SECOND), int(seconds * ROUNDS_A_SECOND)
    with tempfile.TemporaryDirectory(prefix="peerkv-changes-") as folder, agents(Path(folder)) as nodes, ExitStack() as stack:
        (there, pid_a), (here, pid_b) = nodes["node-a"], nodes["node-b"]
        made = [Table(there, number, rounds, each) for number in range(tables)]
        for table in made:
            stack.callback(table.writer.close)
        own, other = Index(there, ""), Index(here, "node-a:")
        until = time.monotonic() + START_SECONDS_MAX
        while own.tables < tables or other.tables < tables:
            assert time.monotonic() < until, f"{other.tables} of {tables} mirrors: {(Path(folder) / 'node-b.log').read_text()}"
            own.look()
            other.look()
            time.sleep(0.01)
        begun, before = time.monotonic(), [cpu_seconds(pid) for pid in (pid_a, pid_b)]
        for number in range(rounds):
            for table in made:
                low = table.publish()
                own.waiting[low] = other.waiting[low] = table.name, time.monotonic()
            while (left := begun + (number + 1) / ROUNDS_A_SECOND - time.monotonic()) > 0:
                own.look()
                other.look()
                time.sleep(min(left, 0.001))
        took = time.monotonic() - begun
        used = [cpu_seconds(pid) - was for pid, was in zip((pid_a, pid_b), before, strict=True)]
        until = time.monotonic() + 5
        while other.waiting and time.monotonic() < until:
            own.look()
            other.look()
        return {
            "tables": tables,
            "changes_per_second": round(tables * each * rounds / took),
            "own_ms": _quantiles(own.ages),
            "other_node_ms": _quantiles(other.ages),
            "never_seen": len(other.waiting),
            "cores_node_a": round(used[0] / took, 3),
            "cores_node_b": round(used[1] / took, 3),
        }


def _quantiles(ages: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(ages, n=100)
    return {"p50": round(1e3 * cuts[49], 1), "p99": round(1e3 * cuts[98], 1), "max": round(1e3 * max(ages), 1)}


def main() -> None:
    """Read the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=64)
    parser.add_argument("--changes", type=int, nargs="+", default=[6_400, 64_000], help="blocks published a second, in all")
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args()
    for changes in given.changes:
        print(json.dumps(measure(given.tables, changes, given.seconds)), flush=True)
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
