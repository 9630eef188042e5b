"""Blocks of every kind, filled with numbers like those of KV."""

import numpy as np

from transport.frames import layouts
from transport.frames.codec import Block
from transport.frames.shape import Axis, Number, Part, Role, Run, Shape

NUMBERS = (Number.BFLOAT16, Number.FLOAT16, Number.FLOAT32)

SHAPES = {
    "attention": lambda number: layouts.attention(3, 2, 16, 64, number),
    "attention by token": lambda number: layouts.attention_by_token(3, 2, 16, 64, number),
    "attention of the CPU": lambda number: layouts.cpu_attention(2, 2, 64, 32, number),
    "latents": lambda number: layouts.latent(2, 16, 576, number),
    "tiles": lambda number: (
        layouts.cpu_tiled_attention(2, 1, 32, 64) if number is Number.BFLOAT16 else layouts.cpu_attention(1, 1, 48, 64, number)
    ),
    "odd width": lambda number: layouts.attention(2, 1, 5, 88, number),
    "two kinds of layers": lambda number: Shape(
        (*layouts.attention(2, 2, 8, 64, number).runs, *layouts.attention(1, 4, 8, 32, number).runs)
    ),
    "tokens in pairs": lambda number: Shape(
        (Run(2, (Part(Role.VALUES, number, ((Axis.TOKEN, 8), (Axis.DIM, 64), (Axis.TOKEN, 2))),)),)
    ),
}


def stored(values, number):
    """Return float32 values as their bytes in a block."""
    if number is Number.BFLOAT16:
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype(np.float16 if number is Number.FLOAT16 else np.float32).view(np.uint8)


def floats(content, number):
    """Return the numbers of a block as float64, in its own order."""
    if number is Number.BFLOAT16:
        return (content.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return content.view(np.float16 if number is Number.FLOAT16 else np.float32).astype(np.float64)


def block(shape, seed=0, position=0, behind=0, scale=1.0):
    """Return a block of normal numbers; every part of a shape has the same kind of them."""
    number = shape.runs[0].parts[0].number
    values = np.random.default_rng(seed).standard_normal(shape.nbytes // number.nbytes).astype(np.float32) * scale
    return Block(shape, stored(values, number), position, behind)


def decoded(codec, given):
    """Return a block's bytes after a codec took them and gave them back."""
    out = np.full(given.shape.nbytes, 0xAA, np.uint8)
    codec.decode(memoryview(codec.encode(given)), given.shape, out)
    return out


def signal_to_noise(given, out, number):
    """Return it in decibels."""
    signal, noise = floats(given, number), floats(given, number) - floats(out, number)
    return float(10 * np.log10((signal**2).sum() / max((noise**2).sum(), 1e-300)))
