"""The bytes of blocks between two nodes: seconds, GB/s and CPU seconds a GB, of the owner's agent and of the one that asks.

    python -m bench.node_blocks

Two processes on the loopback interface, one connection, real tables and memory; with TLS and without, and by NIXL over TCP if
it is installed. Blocks are 32 tokens of a model of 30 layers, 23,040 bytes of a block in each (SmolLM2-135M in bfloat16):
scattered as in an engine, or with all layers side by side, as in host memory.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from transport.backends.shared_memory import map_region, region_of
from transport.keys import chain_keys, root_key
from transport.node.block_client import BlockClient
from transport.node.block_fetcher import BlockFetcher
from transport.node.block_server import BlockServer
from transport.node.keys import client_context, make_keys, server_context
from transport.node.messages import BlocksAsked
from transport.node.nixl.ability import NO_NIXL, ability
from transport.node.nixl.node import NixlNode
from transport.node.nixl.process import NixlProcess
from transport.node.staging import Staging
from transport.table.directory import TableDirectory
from transport.table.layout import Description, Layer, Memory
from transport.table.writer import TableWriter

LAYERS, LAYER_BYTES, BLOCK_TOKENS = 30, 23040, 32


def cpu(beside: int = 0) -> float:
    """CPU seconds of this process so far, and of one beside it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    fields = Path(f"/proc/{beside}/stat").read_text().rpartition(")")[2].split() if beside else ["0"] * 13
    return used.ru_utime + used.ru_stime + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def nixl(name: str, target: Staging) -> NixlNode:
    """NIXL on a node; nothing of it is started yet."""
    os.environ.setdefault("UCX_TLS", "tcp,self")  # between two processes of one machine it would go by shared memory
    return NixlNode(name, "127.0.0.1", ability("nixl"), target.region)


def await_start(process: NixlProcess) -> None:
    """Start a process with NIXL."""
    process.start()
    while process.trouble:
        time.sleep(0.01)


def own(directory: Path, blocks: int, way: str, beside: bool, keys: Path | None, told: int, ends: int) -> None:
    """Serve until `ends` is closed; tell the port, and then the CPU seconds."""
    size = blocks * LAYERS * LAYER_BYTES
    fd = os.memfd_create("kv")
    os.ftruncate(fd, size)
    region = region_of(fd, size)
    kv = np.frombuffer(map_region(region, writable=True), np.uint8)
    kv[:] = 7
    if beside:
        layers = tuple(Layer(0, layer * LAYER_BYTES, LAYERS * LAYER_BYTES, LAYER_BYTES) for layer in range(LAYERS))
    else:
        layers = tuple(Layer(0, layer * blocks * LAYER_BYTES, LAYER_BYTES, LAYER_BYTES) for layer in range(LAYERS))
    memory = Memory(0, "shared_memory", (region,), layers)
    about = Description("owner", os.getpid(), "xxh3_128", "shared_memory", "ok", {}, (memory,))
    table = TableWriter(directory, about, BLOCK_TOKENS, blocks)
    table.publish(range(blocks), chain_keys(root_key(b"bench" * 3 + b"!"), range(blocks), 1))
    node = nixl("node-a", Staging(1 << 20)) if way == "NIXL" else None
    if node is not None:
        await_start(node.owning)
    offers = node.owner if node is not None else NO_NIXL
    server = BlockServer(directory, "node-a", ("127.0.0.1", 0), server_context(keys), "bench", offers)
    server.start()
    pid = node.owning.pid if node is not None else 0
    os.write(told, server.port.to_bytes(4, "little"))
    before = cpu(pid)
    os.read(ends, 1)
    os.write(told, int((cpu(pid) - before) * 1e6).to_bytes(8, "little"))
    if node is not None:
        node.owning.close()
    table.close()
    os._exit(0)


def measure(tokens: int, rounds: int, way: str, beside: bool) -> str:
    """Return a line of figures for imports of so many tokens."""
    blocks, secret = tokens // BLOCK_TOKENS, way != "plain"
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="peerkv-bench-") as name:
        home = Path(name)
        ours = make_keys(home / "keys", ["node-a", "node-b"]) if secret else [None, None]
        told, ends = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ends[1])
            own(home / "tables", blocks, way, beside, ours[0], told[1], ends[0])
        port = int.from_bytes(os.read(told[0], 4), "little")
        reader = TableDirectory(home / "tables").tables()["owner"]
        ids = np.arange(blocks)
        asked = BlocksAsked("owner", reader.epoch, 0, ids.astype("<u4").tobytes(), reader.content(ids)[0].tobytes())
        staging = Staging(blocks * LAYERS * LAYER_BYTES)
        piece = staging.take(blocks, LAYERS * LAYER_BYTES)
        assert piece is not None
        sizes = [LAYERS * LAYER_BYTES] * blocks
        node = nixl("node-b", staging) if way == "NIXL" else None
        version = node.found.version if node is not None else ""
        client = BlockClient("node-a", ("127.0.0.1", port), client_context(ours[1]), "node-b", "bench", version)
        fetcher: BlockFetcher = client
        if node is not None:
            await_start(node.reading)
            fetcher = node.client(client)
        pid = node.reading.pid if node is not None else 0
        fetcher.fetch(asked, sizes, piece)
        before, taken = cpu(pid), []
        for _ in range(rounds):
            begun = time.perf_counter()
            assert fetcher.fetch(asked, sizes, piece).good.all()
            taken.append(time.perf_counter() - begun)
        used = cpu(pid) - before
        assert (piece.rows == 7).all()
        if node is not None:
            node.reading.close()
        os.close(ends[1])
        owner = int.from_bytes(os.read(told[0], 8), "little") / 1e6
        os.waitpid(child, 0)
        gigabytes = piece.rows.size / 1e9
        median = statistics.median(taken)
        return (
            f"{way:>6} {'side by side' if beside else 'scattered':>12} {tokens:7} tokens "
            f"{gigabytes * 1e3:7.0f} MB {median * 1e3:8.1f} ms "
            f"{gigabytes / median:5.2f} GB/s (best {gigabytes / min(taken):5.2f}), "
            f"CPU s/GB {used / rounds / gigabytes:5.2f} here, "
            f"{owner / (rounds + 1) / gigabytes:5.2f} at the owner's"
        )


def main() -> None:
    """Read the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ways", nargs="+", choices=["plain", "TLS", "NIXL"], help="left out: all that there are")
    given = parser.parse_args()
    parts = ("plain", "TLS", *(["NIXL"] if ability("nixl").version else []))
    for way in given.ways or parts:
        for beside in (False, True):
            for tokens in given.tokens:
                print(measure(tokens, given.rounds, way, beside), flush=True)


if __name__ == "__main__":
    main()
