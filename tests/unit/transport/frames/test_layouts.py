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


def about(layout, backend="CPU_ATTN", isa="vec", dtype="auto"):
    return {"strides": layout, "attention backend": backend, "cpu layout": isa, "kv dtype": dtype}


@pytest.mark.parametrize(
    ("fingerprint", "shape"),
    [
        (about("torch.float32 (2, 128, 64) (16384, 8192, 64, 1)"), layouts.cpu_attention(3, 2, 128, 32, Number.FLOAT32)),
        (
            about("torch.bfloat16 (2, 128, 64) (16384, 8192, 64, 1)", isa="vec16"),
            layouts.cpu_attention(3, 2, 128, 32, Number.BFLOAT16),
        ),
        (about("torch.bfloat16 (2, 128, 64) (16384, 8192, 64, 1)", isa="amx"), layouts.cpu_tiled_attention(3, 2, 128, 32)),
        (
            about("torch.bfloat16 (8, 16, 256) (32768, 4096, 256, 1)", "FLASH_ATTN", ""),
            layouts.attention(3, 8, 16, 128, Number.BFLOAT16),
        ),
        (
            about("torch.bfloat16 (8, 16, 256) (32768, 256, 2048, 1)", "FLASH_ATTN", ""),
            layouts.attention_by_token(3, 8, 16, 128, Number.BFLOAT16),
        ),
    ],
    ids=["vec", "vec16", "amx", "gpu", "gpu by token"],
)
def test_a_replicas_fingerprint_tells_the_shape(fingerprint, shape):
    assert layouts.told(fingerprint, shape.nbytes // 3, 3) == shape
    assert layouts.told(fingerprint, shape.nbytes // 3 + 1, 3) is None
    both = f"{fingerprint['strides']}; torch.uint8 (77,) (77, 1)"
    assert layouts.told(fingerprint | {"strides": both}, shape.nbytes // 3, 3) == shape


@pytest.mark.parametrize(
    "other",
    [
        "torch.uint8 (65536,) (65536, 1)",
        "torch.float8_e4m3fn (2, 128, 256) (65536, 32768, 256, 1)",
        "torch.float32 (2, 128, 64) (8192, 16384, 64, 1)",  # tokens outermost
        "torch.float32 (2, 128, 64) (32768, 8192, 64, 1)",  # with gaps between blocks
        "somebody's layout",
    ],
)
def test_layers_of_one_size_of_which_only_some_are_known_have_no_shape(other):
    known = "torch.float32 (2, 128, 64) (16384, 8192, 64, 1)"
    assert layouts.told(about(known), 65536, 3) is not None
    assert layouts.told(about(f"{known}; {other}"), 65536, 3) is None


@pytest.mark.parametrize(
    "fingerprint",
    [
        {},
        about(""),
        about("torch.float32 (2, 128, 64) (8192, 16384, 64, 1)"),  # tokens outermost
        about("torch.float32 (2, 128, 64) (32768, 8192, 64, 1)"),  # with gaps between blocks
        about("torch.uint8 (2, 128, 64) (16384, 8192, 64, 1)"),
        about("torch.float32 (2, 128, 64) (16384, 8192, 64, 1)", dtype="fp8"),
        about("torch.float32 (2, 128, 64) (16384, 8192, 64, 1)", isa="neon"),
        about("torch.float32 (2, 128, 64) (16384, 8192, 64, 1)", "TRITON_MLA", ""),
        about("torch.float32 (2, 24, 64) (3072, 1536, 64, 1)", isa="amx"),
        about("torch.float32 (2, 128, 63) (16128, 8064, 63, 1)"),
    ],
)
def test_a_layout_that_is_not_known_has_no_shape(fingerprint):
    for size in (65536, 16384, 12288, 64512):
        assert layouts.told(fingerprint, size, 3) is None


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
