"""The shapes of blocks as vLLM 0.32 and 0.33 lay them out, for layers that are all alike, as in most models."""

from transport.frames.shape import Axis, Number, Part, Role, Run, Shape


def attention(layers: int, heads: int, tokens: int, dim: int, number: Number) -> Shape:
    """A head's key and value side by side for each token: `[B, H, N, K|V]`, FlashAttention and FlashInfer."""
    axes = ((Axis.OTHER, heads), (Axis.TOKEN, tokens), (Axis.KV, 2), (Axis.DIM, dim))
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
