"""What the kernels that code carry between a GPU and host memory, and whether they make what the codec does, bit for bit.

numba is imported where it is needed alone: vLLM's CPU workers, which import this module too, do not start beside it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from tests.gpu.engine_pair import Bench
from transport.frames.layouts import attention, attention_by_token
from transport.frames.shape import Number, Shape
from transport.table.layout import SlotCodec

PROGRAMS = (8, 16, 24, 32, 48, 64, 96, 128)
ROUNDS = 5
PROGRAM_SECONDS_MAX = 280.0
AWKWARD, UNFIT = 10, (6, 7, 8)
"""Blocks of `_awkward`, and those of them that hold numbers which cannot be coded."""
TYPES = {Number.BFLOAT16: torch.bfloat16, Number.FLOAT16: torch.float16}


def code(bench: Bench, codec: SlotCodec) -> None:
    """GB/s of the blocks' own bytes, coded into pinned memory and restored, by the number of programs; both to the last bit."""
    on_gpu = bool(bench.scale.devices[1])
    program = f"from tests.gpu.coding import coded; coded({codec!r}, {on_gpu})"
    environment = os.environ | ({} if on_gpu else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=PROGRAM_SECONDS_MAX
    )
    for line in done.stdout.splitlines():
        bench.row("code" if codec == "int8" else f"code-{codec}", **json.loads(line))
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])


def coded(codec: SlotCodec, on_gpu: bool) -> None:
    """Print what `code` tells, in a process of its own: a line of figures, then whether bytes are right, layout by layout."""
    large, small = ((32, 8, 16, 128), 1024), ((1, 2, 16, 32), 4)
    sizes, blocks = large if on_gpu else small
    print(json.dumps(_rates(codec, attention_by_token(*sizes, Number.BFLOAT16), blocks, on_gpu)), flush=True)
    shapes = [attention_by_token(*sizes, Number.BFLOAT16), attention(1, 4, 16, 64, Number.FLOAT16)]
    if on_gpu:
        shapes += [attention(2, 5, 16, 128, Number.BFLOAT16), attention(2, 40, 16, 32, Number.BFLOAT16)]
        shapes += [attention(2, 1, 16, 256, Number.BFLOAT16), attention_by_token(1, 2, 16, 1024, Number.FLOAT16)]
    wrong = 0
    for shape in shapes:
        found = _compared(codec, shape, "cuda" if on_gpu else "cpu")
        part = shape.runs[0].parts[0]
        axes = " ".join(f"{kind.name.lower()} {size}" for kind, size in part.axes)
        told = {"layers": shape.runs[0].count, "axes": axes, "numbers": part.number.name}
        print(json.dumps(told | found), flush=True)
        wrong += sum(found.values())
    if wrong:
        raise AssertionError(f"{codec}: other bytes than the codec's, see the rows")


class _Memory:
    """Blocks on a device, those of each layer side by side, and pinned slots for them."""

    def __init__(self, codec: SlotCodec, shape: Shape, source: torch.Tensor) -> None:
        from transport.backends.coding import rows_of
        from transport.frames.slot_codes import coded_size

        rows = rows_of(shape)
        assert rows is not None
        self.codec, self.shape, self.rows = codec, shape, rows
        self.bytes = coded_size(codec, shape)
        self.source, self.target = source, torch.zeros_like(source)
        pin, count = source.is_cuda, source.shape[1]
        self.slots = torch.zeros((count, -(-self.bytes // 64) * 64), dtype=torch.uint8, pin_memory=pin)
        self.unfit = torch.zeros(count, dtype=torch.int32, pin_memory=pin)
        self.place = self.slots.data_ptr(), self.slots.stride(0)
        self.away = torch.stack([torch.randperm(count) for _ in range(2)]).int().to(source.device)
        self.back = self.away.flip(0).contiguous()

    def encode(self, programs: int) -> None:
        from transport.backends.coding import encode

        encode(self.codec, _table(self.source), self.place, self.rows, self.away, self.unfit, programs)

    def decode(self, programs: int) -> None:
        from transport.backends.coding import decode

        decode(self.codec, self.place, _table(self.target), self.rows, self.back, programs)


def _table(layers: torch.Tensor) -> torch.Tensor:
    size = layers[0, 0].numel() * layers.element_size()
    return torch.tensor([[layer.data_ptr(), size, size // 8] for layer in layers]).t().contiguous().to(layers.device)


def _rates(codec: SlotCodec, shape: Shape, blocks: int, on_gpu: bool) -> dict[str, float]:
    """Return GB/s there and back by the number of programs."""
    layers = shape.runs[0].count
    drawn = torch.randn((layers, blocks, shape.nbytes // layers // 2), dtype=torch.bfloat16, device="cuda" if on_gpu else "cpu")
    memory, found = _Memory(codec, shape, drawn), {"mib": shape.nbytes * blocks / (1 << 20)}
    found["coded_mib"] = memory.bytes * blocks / (1 << 20)
    for programs in PROGRAMS if on_gpu else PROGRAMS[:1]:
        for name, copy in (("to_host", memory.encode), ("to_gpu", memory.decode)):
            found[f"{name}_{programs}"] = _rate(partial(copy, programs), shape.nbytes * blocks, on_gpu)
    return {name: round(each, 1) for name, each in found.items()}


def _rate(copy: Callable[[], None], size: int, on_gpu: bool) -> float:
    """Return the best of some copies in GB/s."""
    best = 0.0
    for _ in range(ROUNDS if on_gpu else 1):
        began = time.perf_counter()
        copy()
        if on_gpu:
            torch.cuda.synchronize()
        best = max(best, size / (time.perf_counter() - began) / 1e9)
    return best


def _compared(codec: SlotCodec, shape: Shape, device: str) -> dict[str, int]:
    """Return how many blocks, or bytes, are other than the codec's: coded ones, restored ones, and those told to be unfit."""
    from transport.frames import slot_codes

    layers = shape.runs[0].count
    kind = TYPES[shape.runs[0].parts[0].number]
    source = torch.stack([_awkward(shape.nbytes // layers // 2, kind, layer == layers - 1) for layer in range(layers)])
    memory = _Memory(codec, shape, source.to(device))
    memory.encode(24)
    _wait(device)
    told = [block for block, wrong in zip(memory.away[0].tolist(), memory.unfit.tolist(), strict=True) if wrong]
    found = {"unfit_blocks_wrong": len(set(told) ^ set(UNFIT)), "coded_bytes_wrong": 0, "restored_bytes_wrong": 0}
    wanted: dict[int, Any] = {}
    for block, slot in memory.away.t().tolist():
        if block in UNFIT:
            continue
        bits = np.frombuffer(slot_codes.encode(codec, _content(source, block), shape), np.uint8)
        found["coded_bytes_wrong"] += int((memory.slots[slot, : memory.bytes].numpy() != bits).sum())
        memory.slots[slot, : memory.bytes] = torch.from_numpy(bits.copy())
        wanted[block] = np.empty(shape.nbytes, np.uint8)
        slot_codes.decode(codec, bits, shape, wanted[block])
    memory.decode(24)
    _wait(device)
    target = memory.target.cpu()
    for block, bits in wanted.items():
        found["restored_bytes_wrong"] += int((_content(target, block) != bits).sum())
    return found


def _awkward(size: int, kind: torch.dtype, unfit: bool) -> torch.Tensor:
    """Return a layer of blocks (AWKWARD, size): zeros, what is hardly more, the largest, ties, lone numbers, all alike."""
    numbers = torch.randn(AWKWARD, size) * torch.exp(4 * torch.randn(AWKWARD, size))
    numbers = numbers.clamp(-60000, 60000)
    numbers[0] = 0.0
    numbers[1, : size // 4] = 0.0
    numbers[1, size // 4 :] *= 1e-39 if kind is torch.bfloat16 else 1e-8
    numbers[2] = numbers[2].sign() * (9e14 if kind is torch.bfloat16 else 65504.0)
    numbers[3] = torch.arange(size) % 64 - 31.5
    numbers[4] = 0.0
    numbers[4, 5::32] = -3.0
    numbers[5] = 1.0
    numbers[9] *= 1e-16 if kind is torch.bfloat16 else 1e-4
    made = numbers.to(kind)
    if unfit:
        for block, number in zip(UNFIT, (float("inf"), float("nan"), 1.1e15), strict=True):
            made[block, size // 3] = number
    return made


def _content(layers: torch.Tensor, block: int) -> Any:
    return np.concatenate([layer[block].contiguous().view(torch.uint8).numpy() for layer in layers])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
