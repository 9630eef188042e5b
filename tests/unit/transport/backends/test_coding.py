"""The GPU's codecs, run by Triton's interpreter on CPU memory: to the last bit what those of the frames make of a block."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import itertools
import sys
import numpy as np
import torch
from transport.backends import coding_rotated
from transport.backends.coding import decode, encode, rows_of
from transport.frames import slot_codes
from transport.frames.layouts import attention, attention_by_token
from transport.frames.shape import Number

codec = sys.argv[1]
torch.manual_seed(1)
TYPES = {Number.BFLOAT16: torch.bfloat16, Number.FLOAT16: torch.float16}
SHAPES = [(3, 3, 16, 64), (1, 8, 16, 128), (1, 40, 16, 32)]  # the last one's rows take two pieces each

def table(tensors):
    return torch.tensor([[t.data_ptr(), t.stride(0) * 2, t[0].numel() // 4] for t in tensors]).t().contiguous()

def content(tensors, block):
    return np.concatenate([t[block].contiguous().view(torch.uint8).numpy() for t in tensors])

def numbers(blocks, size, kind):
    found = torch.randn(blocks, size) * torch.exp(4 * torch.randn(blocks, size))
    found[0, : size // 2] = 0.0
    found[1] *= 1e-38
    found[2, :64] = 60000.0
    found[2, 64:128] = torch.arange(64) - 31.5  # halves: ties
    return found.clamp(-60000, 60000).to(kind)

LAYOUTS = [attention, attention_by_token, attention]
CASES = list(itertools.product(TYPES.items(), zip(LAYOUTS, SHAPES)))
if codec != "int8":  # the interpreter takes longer for them
    coding_rotated.PIECE_NUMBERS_MAX = 1024
    SHAPES = [(1, 3, 16, 64), (1, 1, 8, 128), (2, 1, 40, 32)]  # here, too, the last one's rows take two pieces each
    CASES = list(zip([*TYPES.items()] * 2, zip(LAYOUTS, SHAPES)))
for (number, kind), (told, (layers, heads, tokens, width)) in CASES:
    shape = told(layers, heads, tokens, width, number)
    rows, size, coded = rows_of(shape), shape.nbytes // layers // 2, slot_codes.coded_size(codec, shape)
    stride = -(-coded // 64) * 64
    source = [numbers(6, size + 16, kind)[:, :size] for _ in range(layers)]
    slots = torch.full((5, stride), 0x55, dtype=torch.uint8)
    blocks = torch.tensor([[4, 1, 0, 2], [2, 0, 3, 1]], dtype=torch.int32)
    unfit = torch.zeros(4, dtype=torch.int32)
    encode(codec, table(source), (slots.data_ptr(), stride), rows, blocks, unfit, 5)
    assert unfit.tolist() == [0] * 4
    assert rows.coded_bytes(codec) == coded
    assert (slots[:, coded:] == 0x55).all() and (slots[4] == 0x55).all()
    target = [torch.full((4, size + 16), -1.0, dtype=kind)[:, :size] for _ in range(layers)]
    back = torch.tensor([[2, 0, 3, 1], [3, 0, 1, 2]], dtype=torch.int32)
    decode(codec, (slots.data_ptr(), stride), table(target), rows, back, 3)
    for (block, slot), place in zip(blocks.t().tolist(), (3, 0, 1, 2)):
        wanted = np.frombuffer(slot_codes.encode(codec, content(source, block), shape), np.uint8)
        assert (slots[slot, :coded].numpy() == wanted).all(), (number, layers, block)
        out = np.empty(shape.nbytes, np.uint8)
        slot_codes.decode(codec, wanted, shape, out)
        assert (content(target, place) == out).all(), (number, layers, block)
    assert all((t.as_strided((4, 16), (size + 16, 1), size) == -1).all() for t in target)

for wrong in (float("inf"), float("nan"), -1e16):
    shape = attention(2, 2, 16, 64, Number.BFLOAT16)
    source = [torch.randn(3, shape.nbytes // 4).to(torch.bfloat16) for _ in range(2)]
    source[1][1, -1] = wrong
    slots, unfit = torch.zeros(3, shape.nbytes, dtype=torch.uint8), torch.zeros(3, dtype=torch.int32)
    blocks = torch.tensor([[0, 1, 2], [0, 1, 2]], dtype=torch.int32)
    encode(codec, table(source), (slots.data_ptr(), shape.nbytes), rows_of(shape), blocks, unfit, 2)
    assert unfit.tolist() == [0, 1, 0], wrong
print("equal")
"""
SHAPES = {
    "three sizes of a row": "attention(2, 2, 16, 96, Number.BFLOAT16)",
    "float32": "attention(2, 2, 16, 64, Number.FLOAT32)",
    "latents": "latent(2, 16, 512, Number.BFLOAT16)",
    "the CPU's": "cpu_attention(2, 2, 16, 64, Number.BFLOAT16)",
    "scales of no whole 16 bytes": "attention(2, 1, 4, 64, Number.BFLOAT16)",
}


def interpreted(program: str, *arguments: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done.stdout.strip() or done.stderr


@pytest.mark.parametrize("codec", ["int8", "rot4", "rot3"])
def test_blocks_are_coded_and_restored_to_the_bit_and_nothing_beside_them_is_written(codec):
    assert interpreted(PROGRAM, codec) == "equal"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_blocks_that_the_kernels_do_not_take_are_told(shape):
    program = "from transport.backends.coding import rows_of\nfrom transport.frames.layouts import *\nprint(rows_of({}))"
    assert interpreted(program.format(shape)) == "None"
