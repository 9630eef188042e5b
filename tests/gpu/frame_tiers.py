"""Disk and vault on a GPU: what a prompt takes that comes up from there, beside computing it, a hit, and host memory.

One engine whose host memory codes by int8 for who accepts loss, and two processes of frame tiers, as the replica host starts
them: one writes to a disk, one to a vault on loopback. Prompts are computed, evicted by others, restored from host memory,
written by both at once, and dropped by the engine's memories; then each store brings them up. An answer must be that of a hit
to the last bit, or, where blocks were coded, that of a restore from host memory.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from bench.tiers.stores import vault
from engine.frame_tiers.config import VARIABLE, TierConfig, encode_config
from engine.frame_tiers.messages import LENGTH, Answer, Promote, Promoted, TierStats, decode_answer, encode
from engine.frame_tiers.standing import OK
from engine.frame_tiers.store import StoreName
from engine.frame_tiers.vault.server import NoServer, find_program
from engine.host_process.kept_memory import KeptMemories
from tests.gpu import replica
from tests.gpu.engine_pair import Bench
from tests.gpu.host_memory import OPEN_SECONDS_MAX, OWN, REST_SECONDS, TIER, held, keeping
from tests.gpu.import_times import _delivery
from tests.gpu.replica import Replica, prompt
from transport.keys import chain_keys, root_key
from transport.table.deliveries import Delivery
from transport.table.quality import is_lossy_salt, lossy_salt

SALTS = {"raw": "s", "int8": lossy_salt("s")}
STORES: tuple[StoreName, ...] = ("disk", "vault")
DISK_BYTES, VAULT_BYTES = 32 << 30, 20 << 30
READY_SECONDS_MAX = 60.0
WRITE_SECONDS_MAX = 45.0
BRING_SECONDS_MAX = 20.0
LOSE_SECONDS_MAX = 60.0
QUIET_SECONDS = 1.0
"""Nothing was written for so long: all that was to be written is."""
TURN_TOKENS = 16384
"""Shorter prompts are measured with several of them, so many tokens together, at most REPEATS_MAX."""
REPEATS_MAX = 2
_ANSWER = TypeVar("_ANSWER", Promoted, TierStats)


@dataclass
class Asked:
    """A prompt, its kind by SALTS, the answers that the stores' are compared with, and what was measured of it."""

    ids: list[int]
    kind: str
    right: replica.Answer = field(default_factory=replica.Answer)
    cold_seconds: float = 0.0

    @property
    def salt(self) -> str:
        return SALTS[self.kind]


@dataclass(frozen=True)
class Brought:
    """A prompt that came up: the store's part, the engine's, and whether the answer was right."""

    promoted: Promoted
    cpu_seconds: float
    answer: replica.Answer
    delivery: Delivery
    right: bool


class TierProcess:
    """`engine.frame_tiers` with one store in `folder`; it is asked over its socket, as by a gateway."""

    def __init__(self, tables: Path, folder: Path, staging_bytes: int, codec: str, *, vault_url: str = "") -> None:
        self.store: StoreName = "vault" if vault_url else "disk"
        self.began = self.used = 0.0
        """When its store came into use (time.monotonic), and what it had used of the cores by then."""
        self._socket, self._log = folder / f"{self.store}.sock", folder / f"{self.store}.log"
        disk = "" if vault_url else str(folder / "disk")
        config = TierConfig(
            str(self._socket), str(tables), staging_bytes, codec, "int8", disk=disk, disk_bytes=DISK_BYTES, vault=vault_url
        )
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "engine.frame_tiers"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {VARIABLE: encode_config(config)},
            )

    def ready(self) -> "TierProcess":
        """Wait until its store is in use."""
        until = time.monotonic() + READY_SECONDS_MAX
        while True:
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the {self.store} is not in use: {self._log.read_text()[-1500:]}")
            try:
                if self.stats().stores[0].state == OK:
                    self.began, self.used = time.monotonic(), self.cpu_seconds()
                    return self
            except OSError:
                pass
            time.sleep(0.05)

    def stats(self) -> TierStats:
        """Return its figures."""
        return self._heard(None, TierStats, 5.0)

    def bring(self, bench: Bench, ids: list[int], salt: str) -> Promoted:
        """Have a whole prompt brought up."""
        about = bench.directory.tables()[OWN]
        root = root_key(about.fingerprint, salt, hash_name=about.hash_name)
        keys = np.ascontiguousarray(chain_keys(root, ids, about.block_size, about.hash_name)).tobytes()
        ask = Promote(1, about.fingerprint, keys, 0, BRING_SECONDS_MAX, lossy=is_lossy_salt(salt))
        return self._heard(encode(ask), Promoted, BRING_SECONDS_MAX + 5)

    def _heard(self, message: bytes | None, kind: type[_ANSWER], seconds: float) -> _ANSWER:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(seconds)
            line.connect(str(self._socket))
            if message is not None:
                line.sendall(message)
            with line.makefile("rb") as file:
                while True:
                    (size,) = LENGTH.unpack(_exactly(file.read(LENGTH.size), LENGTH.size))
                    answer: Answer = decode_answer(_exactly(file.read(size), size))
                    if isinstance(answer, kind):
                        return answer

    def cpu_seconds(self) -> float:
        """Return what it has used of the cores."""
        used = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, used)) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _exactly(found: bytes, size: int) -> bytes:
    if len(found) != size:
        raise ConnectionError("the process of the frame tiers has ended")
    return found


@contextmanager
def engine_with_host_memory(bench: Bench, size: int = 0) -> Iterator[Replica]:
    """One engine that stores in host memory, which is open; all its memories are empty."""
    bench.tables.mkdir(mode=0o700, parents=True, exist_ok=True)
    keeper = KeptMemories(bench.tables)
    arguments = bench.scale.arguments | keeping(bench, keeper, size) | {"lossy": "int8"}
    engine = Replica(OWN, bench.scale.devices[1], bench.scale.model, bench.tables, **arguments)
    try:
        engine.ready()
        seed, until = time.time_ns(), 0.0
        while not bench.counters(TIER)["published_blocks"]:
            if until and time.monotonic() > until:
                raise TimeoutError(f"nothing was stored in {OPEN_SECONDS_MAX} s")
            seed += 1
            ids = prompt(bench.scale.restores[0], seed)
            engine.ask(ids, 4, logprobs=True, source="", cache_salt=SALTS["int8"], seconds=240)  # a CPU may compile first
            until = until or time.monotonic() + OPEN_SECONDS_MAX
            engine.rest(0.3)
        engine.forget()
        yield engine
    finally:
        engine.stop()


@contextmanager
def tier_processes(bench: Bench, codec: str) -> Iterator[list[TierProcess]]:
    """A disk and, where there is a server for it, a vault; both are in use, and write what is in host memory from then on."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peerkv-frames-")))
        about = bench.directory.tables()[OWN]
        block = sum(layer.bytes for layer in about.memories[0].layers)
        staging = (bench.scale.restores[-1] // about.block_size + 64) * block * 5 // 4
        urls = [""]
        try:
            find_program()
            urls.append(f"valkey://127.0.0.1:{stack.enter_context(vault(VAULT_BYTES)).port}")
        except NoServer as missing:
            bench.row("failed", part="vault", error=str(missing))
        found = []
        for url in urls:
            found.append(TierProcess(bench.tables, folder, staging, codec, vault_url=url))
            stack.callback(found[-1].end)
        yield [each.ready() for each in found]


def written(processes: list[TierProcess]) -> tuple[list[float], bool]:
    """Wait until all that is in host memory is written; return when each wrote last (time.monotonic), and whether it is all."""
    until = time.monotonic() + WRITE_SECONDS_MAX
    frames, changed = [-1] * len(processes), [time.monotonic()] * len(processes)
    while time.monotonic() - max(changed) < QUIET_SECONDS:
        for number, tiers in enumerate(processes):
            found = tiers.stats().stores[0].stored_frames
            if found != frames[number]:
                frames[number], changed[number] = found, time.monotonic()
        if time.monotonic() > until:
            return changed, False
        time.sleep(0.05)
    return changed, True


def lose(bench: Bench, engine: Replica, asked: Asked) -> None:
    """Have an engine give up all blocks of a prompt, by others that are as long as its cache allows."""
    until, seed = time.monotonic() + LOSE_SECONDS_MAX, time.time_ns()
    while held(bench, OWN, asked.ids, asked.salt):
        if time.monotonic() > until:
            raise TimeoutError("a prompt stays in the cache")
        seed += 1
        engine.ask(prompt(bench.scale.restores[-1], seed), source="", cache_salt=SALTS["int8"])
    engine.ask(prompt(20, seed, 1000), 4, source="")  # in its steps the workers tell that the last copies ended


def compute(engine: Replica, asked: Asked) -> replica.Answer:
    """Ask twice: cold, which is noted, and for a hit, which is returned."""
    asked.cold_seconds = ask(engine, asked, "").first_seconds
    asked.right = ask(engine, asked, "")
    return asked.right


def ask(engine: Replica, asked: Asked, source: str) -> replica.Answer:
    return engine.ask(asked.ids, 4, logprobs=True, source=source, cache_salt=asked.salt)


def open_staging(bench: Bench, engine: Replica, tiers: TierProcess, short: Asked) -> float:
    """Have the engine open the memory that prompts come up into, by a prompt that is needed for nothing else; seconds."""
    began = time.monotonic()
    while True:
        found = tiers.bring(bench, short.ids, short.salt)
        if ask(engine, short, tiers.store).cached:
            engine.forget()
            return time.monotonic() - began
        if time.monotonic() - began > OPEN_SECONDS_MAX:
            raise TimeoutError(f"nothing is imported from {tiers.store} after {OPEN_SECONDS_MAX:g} s: {found}")
        engine.forget()
        time.sleep(0.2)


def frame_tiers(bench: Bench, codec: str = "raw-z") -> None:
    """The section: `codec` is that of blocks whose callers do not accept loss."""
    compiling = subprocess.Popen(
        [sys.executable, "-c", "from transport.frames.codecs import compile_codec; compile_codec('int8')"]
    )
    with engine_with_host_memory(bench, min(bench.scale.host_memory, 16 << 30)) as engine, bench.turn():
        with suppress(subprocess.TimeoutExpired):
            compiling.wait(READY_SECONDS_MAX)
        short = Asked(prompt(bench.scale.restores[0] // 4, 1), "raw")
        compute(engine, short)
        prompts = _computed(bench, engine)
        _from_host_memory(bench, engine, prompts)
        lose(bench, engine, short)
        engine.rest(REST_SECONDS)
        with tier_processes(bench, codec) as processes:
            _written(bench, processes, codec)
            engine.forget()
            for tiers in processes:
                opened = open_staging(bench, engine, tiers, short)
                failures = bench.counters()["fallbacks"]
                for (tokens, kind), group in _by_size(prompts).items():
                    brought = [_brought(bench, engine, tiers, asked) for asked in group]
                    _told(bench, tiers.store, codec if kind == "raw" else kind, tokens, group, brought, opened)
                bench.row("frame-tiers", source=tiers.store, failures=bench.counters()["fallbacks"] - failures)
                engine.forget()


def _by_size(prompts: list[Asked]) -> dict[tuple[int, str], list[Asked]]:
    found: dict[tuple[int, str], list[Asked]] = defaultdict(list)
    for asked in prompts:
        found[len(asked.ids), asked.kind].append(asked)
    return found


def _computed(bench: Bench, engine: Replica) -> list[Asked]:
    """Compute prompts of all sizes and kinds; each evicts those before it, as far as the cache's size has it."""
    prompts: list[Asked] = []
    for tokens in bench.scale.restores:
        for kind in SALTS:
            count = max(1, min(REPEATS_MAX, TURN_TOKENS // tokens))
            fresh = [Asked(prompt(tokens, time.time_ns()), kind) for _ in range(count)]
            hits = [compute(engine, asked).first_seconds for asked in fresh]
            prompts += fresh
            bench.row(
                "frame-tiers", tokens=tokens, kind=kind, hit_ms=statistics.median(hits) * 1e3,
                cold_ms=statistics.median(asked.cold_seconds for asked in fresh) * 1e3, repeats=count,
            )  # fmt: skip
    return prompts


def _from_host_memory(bench: Bench, engine: Replica, prompts: list[Asked]) -> None:
    for (tokens, kind), group in _by_size(prompts).items():
        times, copies, same, stored = [], [], 0, 0
        for asked in group:
            lose(bench, engine, asked)
            engine.rest(REST_SECONDS)
            stored = max(stored, held(bench, TIER, asked.ids, asked.salt))
            cursor, _ = bench.directory.tables()[OWN].deliveries(1 << 62)
            answer = ask(engine, asked, TIER)
            times.append(answer.first_seconds)
            copies.append(_delivery(bench, cursor))
            if kind == "raw":
                same += answer.same_as(asked.right)
            else:
                asked.right = answer
        bench.row(
            "frame-tiers", source="host memory", tokens=tokens, kind=kind, ms=statistics.median(times) * 1e3,
            copy_gb_per_s=_rate(copies), copy_ms=statistics.median(each.import_ns / 1e6 for each in copies),
            restored_tokens=[each.peer_tokens for each in copies], stored_blocks=stored,
            same_as_hit=f"{same} of {len(group)}" if kind == "raw" else "not meant to be",
        )  # fmt: skip


def _written(bench: Bench, processes: list[TierProcess], codec: str) -> None:
    """Wait until all that is in host memory is written, to both at once, and tell at which rates."""
    changed, whole = written(processes)
    for tiers, ended in zip(processes, changed, strict=True):
        stats, used, began = tiers.stats(), tiers.cpu_seconds() - tiers.used, tiers.began
        store = stats.stores[0]
        size = store.stored_bytes / 1e9
        bench.row(
            "frame-tiers", written=tiers.store, codec=codec, frames=store.stored_frames, gb=size, seconds=ended - began,
            gb_per_s=size / max(1e-9, ended - began), cpu_s_per_gb=used / max(1e-9, size), dropped=store.dropped_frames,
            all_of_it=whole, lost=stats.lost_blocks, unknown=stats.unknown_blocks, errors=store.errors,
        )  # fmt: skip


def _brought(bench: Bench, engine: Replica, tiers: TierProcess, asked: Asked) -> Brought:
    used = tiers.cpu_seconds()
    promoted = tiers.bring(bench, asked.ids, asked.salt)
    used = tiers.cpu_seconds() - used
    cursor, _ = bench.directory.tables()[OWN].deliveries(1 << 62)
    answer = ask(engine, asked, tiers.store)
    return Brought(promoted, used, answer, _delivery(bench, cursor), answer.same_as(asked.right))


def _told(bench: Bench, store: str, codec: str, tokens: int, group: list[Asked], brought: list[Brought], opened: float) -> None:
    """Print a row: GB are of the blocks' own bytes, but for `frame_gb`."""
    about = bench.directory.tables()[OWN]
    block = sum(layer.bytes for layer in about.memories[0].layers)
    seconds = statistics.median(each.promoted.seconds for each in brought)
    size = statistics.median(each.promoted.tokens // about.block_size * block / 1e9 for each in brought)
    first = statistics.median(each.answer.first_seconds for each in brought)
    cold = statistics.median(asked.cold_seconds for asked in group)
    bench.row(
        "frame-tiers", source=store, codec=codec, tokens=tokens, ms=(seconds + first) * 1e3, bring_ms=seconds * 1e3,
        import_ms=first * 1e3, cold_over_restore=cold / (seconds + first), gb=size, bring_gb_per_s=size / max(1e-9, seconds),
        frame_gb=statistics.median(each.promoted.bytes / 1e9 for each in brought),
        cpu_s_per_gb=statistics.median(each.cpu_seconds for each in brought) / max(1e-9, size),
        copy_gb_per_s=_rate([each.delivery for each in brought]),
        brought_tokens=[each.promoted.tokens for each in brought],
        imported_tokens=[each.delivery.peer_tokens for each in brought],
        same=f"{sum(each.right for each in brought)} of {len(brought)}", opened_seconds=opened,
        why="; ".join({each.promoted.why for each in brought} - {""}),
    )  # fmt: skip


def _rate(copies: list[Delivery]) -> float:
    return statistics.median(each.import_bytes / max(1, each.import_ns) for each in copies)
