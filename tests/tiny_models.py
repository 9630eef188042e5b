"""Tiny models, one a family of KV caches, that vLLM starts in seconds: a config for dummy weights, or random weights too."""

from pathlib import Path
from typing import Any

BASE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WORDS_FIRST, WORDS_END = 10, 4000
"""Token ids that prompts are made of."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 3, "head_dim": 32, "architectures": ["LlamaForCausalLM"]}),
    # sliding windows beside full attention: six groups of a layer each, two of two layers
    "gemma3": (
        "gemma3_text",
        {"head_dim": 32, "num_hidden_layers": 6, "sliding_window": 256, "architectures": ["Gemma3ForCausalLM"]},
    ),
    "gptoss": (
        "gpt_oss",
        {
            "head_dim": 32,
            "num_hidden_layers": 4,
            "sliding_window": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "architectures": ["GptOssForCausalLM"],
        },
    ),
    # multi-head latent attention
    "deepseek": (
        "deepseek_v2",
        {
            "num_key_value_heads": 4,
            "num_hidden_layers": 2,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "architectures": ["DeepseekV2ForCausalLM"],
        },
    ),
    # state layers beside full attention: gated delta net, Mamba 2
    "qwen3next": (
        "qwen3_next",
        {
            "head_dim": 64,
            "num_hidden_layers": 4,
            "full_attention_interval": 4,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "architectures": ["Qwen3NextForCausalLM"],
        },
    ),
    "granite4": (
        "granitemoehybrid",
        {
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "mamba_n_heads": 16,
            "mamba_d_head": 16,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_chunk_size": 64,
            "num_local_experts": 0,
            "shared_intermediate_size": 256,
            "position_embedding_type": "rope",
            "architectures": ["GraniteMoeHybridForCausalLM"],
        },
    ),
}


def write_tiny_model(folder: Path, family: str, *, weights: bool = False, scores: bool = False, **changes: Any) -> Path:
    """Write the config of a family, with `changes`, into a folder of its own under `folder`; return that.

    With `weights`, random ones too, large beside the embeddings, so that another context gives other tokens: vLLM's dummies of
    at most 0.001 answer nearly the same whatever they are asked. With `scores` they make one number of a text, not tokens.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

    kind, own = MODELS[family]
    made = folder / family
    made.mkdir(parents=True, exist_ok=True)
    config = CONFIG_MAPPING[kind](**(BASE | own | {"initializer_range": 0.1, "tie_word_embeddings": False} | changes))
    if not weights:
        config.save_pretrained(made)
        return made
    import torch

    torch.manual_seed(1)
    kinds = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = kinds.from_config(config, dtype=torch.bfloat16)
    model.get_input_embeddings().weight.data *= 0.1
    model.save_pretrained(made)
    return made
