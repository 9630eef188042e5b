"""Host memory that codes on a GPU: a restore beside one of blocks as they are."""

import time
from typing import Any

from engine.host_process.kept_memory import KeptMemories
from tests.gpu.engine_pair import Bench
from tests.gpu.host_memory import OWN, TIER, keeping
from tests.gpu.import_times import _delivery
from tests.gpu.replica import Replica, median, prompt
from transport.keys import chain_keys, root_key
from transport.table.deliveries import Delivery
from transport.table.quality import in_code, lossy_salt

SALTS = {"raw": "s", "coded": lossy_salt("s")}
REPEATS = 5
OPEN_SECONDS_MAX = 60.0


def restore_coded(bench: Bench, codec: str) -> None:
    """Time to the first token and of the copy, from host memory: blocks as they are, and, in the same engine, coded ones."""
    bench.tables.mkdir(mode=0o700, parents=True, exist_ok=True)
    keeper = KeptMemories(bench.tables)
    with bench.pair(importer=keeping(bench, keeper) | {"lossy": codec}) as (_, engine):
        _open(bench, engine)
        for tokens in bench.scale.restores:
            times: dict[str, list[float]] = {kind: [] for kind in SALTS}
            copies: dict[str, list[Delivery]] = {kind: [] for kind in SALTS}
            coded = dict.fromkeys(SALTS, 0)
            for turn in range(REPEATS):
                for kind, salt in SALTS.items():
                    ids = prompt(tokens, 10 * tokens + 2 * turn + (kind == "coded"))
                    engine.ask(ids, source="", cache_salt=salt)
                    _lose(bench, engine, ids, salt, 1000 * (tokens + 2 * turn))
                    coded[kind] = max(coded[kind], int(in_code(_held(bench, TIER, ids, salt)).sum()))
                    cursor, _ = bench.directory.tables()[OWN].deliveries(1 << 62)
                    times[kind].append(engine.ask(ids, source=TIER, cache_salt=salt).first_seconds)
                    copies[kind].append(_delivery(bench, cursor))
            first = {kind: median(found) * 1e3 for kind, found in times.items()}
            copied = {kind: median([each.import_ns / 1e6 for each in found]) for kind, found in copies.items()}
            bench.row(
                f"restore-{codec}", tokens=tokens, **{f"{kind}_ms": ms for kind, ms in first.items()},
                **{f"{kind}_copy_ms": ms for kind, ms in copied.items()},
                raw_over_coded=first["raw"] / first["coded"], raw_over_coded_copy=copied["raw"] / copied["coded"],
                restored_tokens=[[each.peer_tokens for each in found] for found in copies.values()],
                coded_blocks=list(coded.values()), repeats=REPEATS,
            )  # fmt: skip
        bench.row(f"restore-{codec}", slots=bench.directory.tables()[TIER].num_blocks, failures=bench.counters()["fallbacks"])


def _open(bench: Bench, engine: Replica) -> None:
    """Wait until something was stored and restored."""
    began, seed = time.monotonic(), time.time_ns()
    while time.monotonic() - began < OPEN_SECONDS_MAX:
        seed += 1
        ids = prompt(bench.scale.restores[0], seed)
        engine.ask(ids, source="", cache_salt=SALTS["coded"])
        _lose(bench, engine, ids, SALTS["coded"], seed)
        if engine.ask(ids, source=TIER, cache_salt=SALTS["coded"]).cached:
            return
    raise TimeoutError(f"nothing was stored and restored in {OPEN_SECONDS_MAX} s")


def _held(bench: Bench, name: str, ids: list[int], salt: str) -> Any:
    """Return the states of the leading blocks of a prompt that a table offers."""
    table = bench.directory.tables()[name]
    keys = chain_keys(root_key(table.fingerprint, salt, hash_name=table.hash_name), ids, table.block_size, table.hash_name)
    return table.longest_run(keys).states


def _lose(bench: Bench, engine: Replica, ids: list[int], salt: str, seed: int) -> None:
    """Have an engine give up all blocks of a prompt, by others of its length."""
    until = time.monotonic() + 30
    while len(_held(bench, OWN, ids, salt)):
        if time.monotonic() > until:
            raise TimeoutError("a prompt stays in the cache")
        seed += 1
        engine.ask(prompt(len(ids), seed), source="")
    engine.ask(prompt(20, seed + 99, 1000), 4, source="")  # in its steps the workers tell that the last copies ended
