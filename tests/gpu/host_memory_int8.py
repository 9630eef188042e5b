"""Host memory that codes by int8 on a GPU: a restore beside one of blocks as they are, and what the kernels carry."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from engine.host_process.kept_memory import KeptMemories
from tests.gpu.engine_pair import Bench
from tests.gpu.host_memory import OWN, TIER, keeping
from tests.gpu.import_times import _delivery
from tests.gpu.replica import Replica, median, prompt
from transport.keys import chain_keys, root_key
from transport.table.deliveries import Delivery
from transport.table.quality import in_code, lossy_salt

SALTS = {"raw": "s", "int8": lossy_salt("s")}
REPEATS = 5
OPEN_SECONDS_MAX = 60.0
PROGRAMS = (8, 16, 24, 32, 48, 64)
ROUNDS = 5


def restore_int8(bench: Bench) -> None:
    """Time to the first token and of the copy, from host memory: blocks as they are, and, in the same engine, coded ones."""
    bench.tables.mkdir(mode=0o700, parents=True, exist_ok=True)
    keeper = KeptMemories(bench.tables)
    with bench.pair(importer=keeping(bench, keeper) | {"lossy": "int8"}) as (_, engine):
        _open(bench, engine)
        for tokens in bench.scale.restores:
            times: dict[str, list[float]] = {kind: [] for kind in SALTS}
            copies: dict[str, list[Delivery]] = {kind: [] for kind in SALTS}
            coded = dict.fromkeys(SALTS, 0)
            for turn in range(REPEATS):
                for kind, salt in SALTS.items():
                    ids = prompt(tokens, 10 * tokens + 2 * turn + (kind == "int8"))
                    engine.ask(ids, source="", cache_salt=salt)
                    _lose(bench, engine, ids, salt, 1000 * (tokens + 2 * turn))
                    coded[kind] = max(coded[kind], int(in_code(_held(bench, TIER, ids, salt)).sum()))
                    cursor, _ = bench.directory.tables()[OWN].deliveries(1 << 62)
                    times[kind].append(engine.ask(ids, source=TIER, cache_salt=salt).first_seconds)
                    copies[kind].append(_delivery(bench, cursor))
            first = {kind: median(found) * 1e3 for kind, found in times.items()}
            copied = {kind: median([each.import_ns / 1e6 for each in found]) for kind, found in copies.items()}
            bench.row(
                "restore-int8", tokens=tokens, **{f"{kind}_ms": ms for kind, ms in first.items()},
                **{f"{kind}_copy_ms": ms for kind, ms in copied.items()},
                raw_over_int8=first["raw"] / first["int8"], raw_over_int8_copy=copied["raw"] / copied["int8"],
                restored_tokens=[[each.peer_tokens for each in found] for found in copies.values()],
                coded_blocks=list(coded.values()), repeats=REPEATS,
            )  # fmt: skip
        bench.row("restore-int8", slots=bench.directory.tables()[TIER].num_blocks, failures=bench.counters()["fallbacks"])


def _open(bench: Bench, engine: Replica) -> None:
    """Wait until something was stored and restored."""
    began, seed = time.monotonic(), time.time_ns()
    while time.monotonic() - began < OPEN_SECONDS_MAX:
        seed += 1
        ids = prompt(bench.scale.restores[0], seed)
        engine.ask(ids, source="", cache_salt=SALTS["int8"])
        _lose(bench, engine, ids, SALTS["int8"], seed)
        if engine.ask(ids, source=TIER, cache_salt=SALTS["int8"]).cached:
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


def code(bench: Bench) -> None:
    """GB/s of the blocks' own bytes, coded into pinned memory and restored, by the number of programs; both to the last bit."""
    on_gpu = bool(bench.scale.devices[1])
    sizes = (32, 8, 16, 128, 1024) if on_gpu else (2, 2, 16, 32, 6)
    program = f"from tests.gpu.host_memory_int8 import code_rates; code_rates({on_gpu}, {sizes})"
    environment = os.environ | ({} if on_gpu else {"TRITON_INTERPRET": "1"})
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=90)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    bench.row("code", **json.loads(done.stdout.splitlines()[-1]))


def code_rates(on_gpu: bool, sizes: tuple[int, int, int, int, int]) -> None:
    """Print what `code` tells, in a process of its own; `sizes`: layers, heads, tokens and numbers of a block, and blocks."""
    import torch

    from transport.backends.coding import decode, encode, rows_of
    from transport.frames import slot_codes
    from transport.frames.layouts import attention_by_token
    from transport.frames.shape import Number

    layers, heads, tokens, width, count = sizes
    shape = attention_by_token(layers, heads, tokens, width, Number.BFLOAT16)
    rows, size = rows_of(shape), shape.nbytes // layers
    assert rows is not None
    coded = slot_codes.coded_size("int8", shape)
    stride = -(-coded // 64) * 64
    device = "cuda" if on_gpu else "cpu"
    source = torch.randn((layers, count, size // 2), dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    slots = torch.empty((count, stride), dtype=torch.uint8, pin_memory=on_gpu)
    unfit = torch.zeros(count, dtype=torch.int32, pin_memory=on_gpu)
    away = torch.stack([torch.randperm(count) for _ in range(2)]).int().to(device)
    back = away.flip(0).contiguous()

    def table(tensor: Any) -> Any:
        return torch.tensor([[layer.data_ptr(), size, size // 8] for layer in tensor]).t().contiguous().to(device)

    here, there, place = table(source), table(target), (slots.data_ptr(), stride)
    found: dict[str, float] = {}
    for programs in PROGRAMS if on_gpu else PROGRAMS[:1]:
        for name, copy in (
            ("to_host", partial(encode, "int8", here, place, rows, away, unfit, programs)),
            ("to_gpu", partial(decode, "int8", place, there, rows, back, programs)),
        ):
            found[f"{name}_{programs}"] = round(_rate(copy, shape.nbytes * count, on_gpu), 1)
    for block, slot in away[:, :4].t().tolist():
        content = torch.cat([layer[block] for layer in source]).cpu().view(torch.uint8).numpy()
        wanted, restored = np.frombuffer(slot_codes.encode("int8", content, shape), np.uint8), np.empty(shape.nbytes, np.uint8)
        slot_codes.decode("int8", wanted, shape, restored)
        assert (slots[slot, :coded].numpy() == wanted).all(), "another code than the codec's"
        out = torch.cat([layer[block] for layer in target]).cpu().view(torch.uint8).numpy()
        assert (out == restored).all(), "restored otherwise than by the codec"
    assert not unfit.any()
    print(json.dumps({"mib": shape.nbytes * count >> 20, "coded_mib": coded * count >> 20, **found}))


def _rate(copy: Callable[[], None], size: int, on_gpu: bool) -> float:
    """Return the best of some copies in GB/s."""
    import torch

    best = 0.0
    for _ in range(ROUNDS if on_gpu else 1):
        began = time.perf_counter()
        copy()
        if on_gpu:
            torch.cuda.synchronize()
        best = max(best, size / (time.perf_counter() - began) / 1e9)
    return best
