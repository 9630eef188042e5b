"""The shapes of blocks as vLLM 0.32 and 0.33 lay them out, for layers that are all alike, as in most models."""

import math
import re
from collections.abc import Mapping

from transport.frames.shape import Axis, Number, Part, Role, Run, Shape

NUMBERS: Mapping[str, Number] = {
    "torch.bfloat16": Number.BFLOAT16,
    "torch.float16": Number.FLOAT16,
    "torch.float32": Number.FLOAT32,
}
"""What torch calls them."""
_LAYOUT = re.compile(r"(?P<number>\S+) \((?P<sizes>\d+(, \d+)*),?\) \((?P<strides>\d+(, \d+)*)\)")
_BITS = re.compile(r"\d+")


def attention(layers: int, heads: int, tokens: int, dim: int, number: Number) -> Shape:
    """A head's keys and values side by side for each token: `[B, H, N, K|V]`, FlashInfer, and FlashAttention if so asked."""
    axes = ((Axis.OTHER, heads), (Axis.TOKEN, tokens), (Axis.KV, 2), (Axis.DIM, dim))
    return Shape((Run(layers, (Part(Role.PAIRS, number, axes),)),))


def attention_by_token(layers: int, heads: int, tokens: int, dim: int, number: Number) -> Shape:
    """A token's keys and values side by side for each head: `[B, N, H, K|V]`, FlashAttention where nobody wishes otherwise."""
    axes = ((Axis.TOKEN, tokens), (Axis.OTHER, heads), (Axis.KV, 2), (Axis.DIM, dim))
    return Shape((Run(layers, (Part(Role.PAIRS, number, axes),)),))


def cpu_attention(layers: int, heads: int, tokens: int, dim: int, number: Number) -> Shape:
    """vLLM's CPU attention on vectors (`vec`, `vec16`): a head's keys by dimension, then its values by token."""
    keys = Part(Role.KEYS, number, ((Axis.DIM, dim), (Axis.TOKEN, tokens)))
    values = Part(Role.VALUES, number, ((Axis.TOKEN, tokens), (Axis.DIM, dim)))
    return Shape((Run(layers * heads, (keys, values)),))


def cpu_tiled_attention(layers: int, heads: int, tokens: int, dim: int) -> Shape:
    """vLLM's CPU attention on tiles (`amx`), of bfloat16: keys in tiles of 16 tokens, values in tiles of 16 dimensions.

    Raises ValueError unless `tokens` and `dim` are multiples of 16.
    """
    if tokens % 16 or dim % 16:
        raise ValueError(f"{tokens} tokens of {dim} numbers a block do not fill tiles of 16")
    tiles = ((Axis.TOKEN, tokens // 16), (Axis.DIM, dim // 2), (Axis.TOKEN, 16), (Axis.DIM, 2))
    keys = Part(Role.KEYS, Number.BFLOAT16, tiles)
    tiles = ((Axis.DIM, dim // 16), (Axis.TOKEN, tokens // 2), (Axis.DIM, 16), (Axis.TOKEN, 2))
    values = Part(Role.VALUES, Number.BFLOAT16, tiles)
    return Shape((Run(layers * heads, (keys, values)),))


def latent(layers: int, tokens: int, dim: int, number: Number) -> Shape:
    """Multi-head latent attention: a row for each token and layer, latent and rotary key (512 + 64 in DeepSeek V3)."""
    return Shape((Run(layers, (Part(Role.LATENT, number, ((Axis.TOKEN, tokens), (Axis.DIM, dim))),)),))


def state(layers: int, size: int, number: Number = Number.BYTES) -> Shape:
    """The state of a layer at one token: `size` numbers."""
    return Shape((Run(layers, (Part(Role.STATE, number, ((Axis.DIM, size),)),)),))


def opaque(layer_bytes: tuple[int, ...]) -> Shape:
    """Layers of so many bytes of which nothing else is known, such as those of quantised caches."""
    runs: list[Run] = []
    for size in layer_bytes:
        part = Part(Role.STATE, Number.BYTES, ((Axis.DIM, size),))
        if runs and runs[-1].parts == (part,):
            runs[-1] = Run(runs[-1].count + 1, (part,))
        else:
            runs.append(Run(1, (part,)))
    return Shape(tuple(runs))


def told(fingerprint: Mapping[str, str], layer_bytes: int, layers: int) -> Shape | None:
    """Return the shape of blocks of `layers` attention layers of so many bytes each, as a replica's fingerprint tells it.

    None for what is not known here: codecs with loss do not take it. Nor do they where some of the layers of that size may be
    of another kind: their numbers would be taken for others.
    """
    known = {each: _told(fingerprint, each, layers) for each in fingerprint.get("strides", "").split("; ")}
    fitting = [shape for shape in known.values() if shape is not None and shape.nbytes == layers * layer_bytes]
    doubtful = any(shape is None and _bytes(each) in (0, layer_bytes) for each, shape in known.items())
    return fitting[0] if len(fitting) == 1 and not doubtful else None


def _bytes(layout: str) -> int:
    """Return how many bytes a block has in one kind of layer; 0 if that cannot be told."""
    match = _LAYOUT.fullmatch(layout)
    bits = None if match is None else _BITS.search(match["number"])
    if match is None or bits is None:
        return 0
    return math.prod(int(each) for each in match["sizes"].split(", ")) * int(bits[0]) // 8


def _told(fingerprint: Mapping[str, str], layout: str, layers: int) -> Shape | None:
    """Of one kind of layer: `torch.bfloat16 (heads, tokens, 2 * dim) (strides)`, the first of the strides that of a block."""
    match = _LAYOUT.fullmatch(layout)
    if match is None or match["number"] not in NUMBERS:
        return None
    number = NUMBERS[match["number"]]
    sizes, strides = (tuple(int(each) for each in match[name].split(", ")) for name in ("sizes", "strides"))
    backend, isa = fingerprint.get("attention backend", ""), fingerprint.get("cpu layout", "")
    by_head = len(sizes) == 3 and strides == (math.prod(sizes), sizes[1] * sizes[2], sizes[2], 1)
    by_token = len(sizes) == 3 and strides == (math.prod(sizes), sizes[2], sizes[0] * sizes[2], 1)
    if (
        not (by_head or by_token)
        or sizes[2] % 2
        or fingerprint.get("kv dtype") not in ("auto", "bfloat16", "float16", "float32")
    ):
        return None
    heads, tokens, dim = sizes[0], sizes[1], sizes[2] // 2
    if backend in ("FLASH_ATTN", "FLASHINFER"):
        return (attention if by_head else attention_by_token)(layers, heads, tokens, dim, number)
    if not by_head:
        return None
    if backend == "CPU_ATTN" and isa in ("vec", "vec16"):
        return cpu_attention(layers, heads, tokens, dim, number)
    if backend == "CPU_ATTN" and isa == "amx" and number is Number.BFLOAT16 and not (tokens % 16 or dim % 16):
        return cpu_tiled_attention(layers, heads, tokens, dim)
    return None
