"""Shapes are those of vLLM's pages: what its own operation writes for a token is that token's row."""

import numpy as np
import pytest

from transport.frames import layouts
from transport.frames.errors import FrameDamaged
from transport.frames.shape import Axis, Number, Part, Role, Run, Shape, by_token, unpacked

HEADS, TOKENS, DIM = 2, 64, 32


def test_a_shape_is_read_back_as_it_was_written():
    shapes = (
        layouts.attention(32, 8, 16, 128, Number.BFLOAT16),
        layouts.opaque((5, 5, 7)),
        layouts.latent(2, 16, 576, Number.FLOAT16),
    )
    assert [unpacked(shape.packed) for shape in shapes] == list(shapes)


def test_a_shape_that_cannot_be_is_damage():
    good = layouts.attention(2, 2, 16, 64, Number.BFLOAT16).packed
    for place in range(len(good)):
        for value in (0, 5, 255):
            changed = good[:place] + bytes([value]) + good[place + 1 :]
            try:
                assert unpacked(changed).packed == changed
            except FrameDamaged:
                continue
    for length in range(len(good)):
        with pytest.raises(FrameDamaged):
            unpacked(good[:length])


def test_parts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="KV of 2"):
        Part(Role.PAIRS, Number.FLOAT16, ((Axis.TOKEN, 4), (Axis.DIM, 8)))
    with pytest.raises(ValueError, match="tiles of 16"):
        layouts.cpu_tiled_attention(1, 1, 24, 64)
    four, eight = (Part(Role.KEYS, Number.FLOAT16, ((Axis.TOKEN, tokens), (Axis.DIM, 8))) for tokens in (4, 8))
    with pytest.raises(ValueError, match="tokens"):
        Shape((Run(1, (four, eight)),))


@pytest.mark.parametrize(
    ("shape", "way"),
    [
        (layouts.cpu_attention(1, HEADS, TOKENS, DIM, Number.BFLOAT16), "vec"),
        (layouts.cpu_attention(1, HEADS, TOKENS, DIM, Number.BFLOAT16), "vec16"),
        (layouts.cpu_tiled_attention(1, HEADS, TOKENS, DIM), "amx"),
    ],
    ids=["vec", "vec16", "amx"],
)
def test_the_cpus_pages_are_read_token_by_token(shape, way):
    torch = pytest.importorskip("torch")
    ops = pytest.importorskip("vllm._custom_ops")
    pages = torch.zeros(1, HEADS, TOKENS * 2, DIM, dtype=torch.bfloat16)
    keys, values = torch.randn(2, TOKENS, HEADS, DIM).to(torch.bfloat16)
    try:
        ops.cpu_attn_reshape_and_cache(keys, values, *pages.chunk(2, dim=2), torch.arange(TOKENS), way)
    except RuntimeError as error:
        pytest.skip(f"not on this processor: {error}")
    for (part, piece), given in zip(shape.pieces(pages.view(torch.uint8).numpy().reshape(-1)), (keys, values), strict=True):
        rows = by_token(part, piece).reshape(HEADS, TOKENS, DIM)
        assert np.array_equal(rows, given.view(torch.uint16).numpy().transpose(1, 0, 2))
