"""vLLM's description of its KV cache groups, read: in the table's order, or refused with a reason."""

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupRole,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from engine.connector.vllm_groups import GroupNotHandled, model_groups
from transport.groups import Group

SHAPE = {"block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.bfloat16}
BYTES = 16 * 2 * (8 + 8) * 2
FULL = FullAttentionSpec(**SHAPE)
WINDOW = SlidingWindowSpec(**SHAPE, sliding_window=40, extra_retained_tokens=2)
STATE = {"block_size": 32, "shapes": ((3, 4), (2, 8)), "dtypes": (torch.bfloat16, torch.float32), "page_size_padded": 4096}


def test_groups_that_need_all_blocks_come_first_and_keep_vllms_number():
    found = model_groups([KVCacheGroupSpec(["a", "b"], WINDOW), KVCacheGroupSpec(["c"], FULL)])
    assert found.groups == (Group("full", 16, 0, 1, BYTES), Group("window", 16, 42, 2, 2 * BYTES))
    assert found.layers == {"c": 0, "a": 1, "b": 1}
    assert found.ordered(([1, 2], [3])) == [[3], [1, 2]]
    assert not found.plain
    assert not found.restores_states


def test_states_are_measured_without_their_padding_and_are_completed_by_an_import():
    found = model_groups([KVCacheGroupSpec(["m"], MambaSpec(**STATE, mamba_cache_mode="align")), KVCacheGroupSpec(["f"], FULL)])
    assert found.groups[1] == Group("state", 32, 0, 1, 3 * 4 * 2 + 2 * 8 * 4)
    assert (found.unit, found.step) == (16, 32)
    assert found.restores_states


def test_latent_attention_and_layers_of_several_shapes_are_one_group_that_needs_all_blocks():
    latent = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    found = model_groups([KVCacheGroupSpec(["a", "b"], latent)])
    assert found.plain
    assert found.groups == (Group("full", 16, 0, 2, 2 * 16 * 576 * 2),)
    wide = FullAttentionSpec(**SHAPE | {"head_size": 16})
    both = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": FULL, "b": wide})
    assert model_groups([KVCacheGroupSpec(["a", "b"], both)]).groups == (Group("full", 16, 0, 2, 3 * BYTES),)


def test_chunks_are_a_kind_of_their_own():
    found = model_groups([KVCacheGroupSpec(["a"], ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=64))])
    assert found.groups == (Group("chunk", 16, 64, 1, BYTES),)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([], "0 KV cache groups"),
        ([KVCacheGroupSpec(["a"], CrossAttentionSpec(**SHAPE))], "CrossAttentionSpec"),
        ([KVCacheGroupSpec(["a"], MambaSpec(**STATE, mamba_cache_mode="none"))], "mode 'none'"),
        ([KVCacheGroupSpec(["a"], FullAttentionSpec(**SHAPE, tokens_per_state=4))], "compressed"),
        ([KVCacheGroupSpec(["a"], FULL, enable_kv_transfer=False)], "outside the pool"),
        ([KVCacheGroupSpec(["a"], FULL, role=KVCacheGroupRole.HISPARSE_SOURCE)], "hisparse_source"),
        (
            [KVCacheGroupSpec(["a", "b"], UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": FULL, "b": WINDOW}))],
            "different blocks",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_handled_is_refused_with_the_reason(groups, said):
    with pytest.raises(GroupNotHandled, match=said):
        model_groups(groups)
