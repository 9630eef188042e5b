"""What we read from vLLM's own objects outside its connector interface; works with 0.32 and 0.33."""

from typing import Any

import vllm
from vllm.v1.metrics.cache_hit_source import CacheHitSource

PEER_HITS: Any = CacheHitSource.P2P


def vllm_version() -> str:
    """Return the version that KV bytes depend on."""
    return str(vllm.__version__)


def attention_backend(vllm_config: Any, layer: str) -> str:
    """Return the name of the attention backend of a layer, which decides how a block is laid out inside."""
    module = vllm_config.compilation_config.static_forward_context.get(layer)
    return str(module.get_attn_backend().get_name()) if module is not None else "unknown"


def kv_scales(vllm_config: Any, layers: list[str]) -> str:
    """Return the scales of a quantised KV cache, which vLLM keeps in the layers, not in the cache."""
    if str(vllm_config.cache_config.cache_dtype) in ("auto", "bfloat16", "float16", "float32"):
        return "none"
    context = vllm_config.compilation_config.static_forward_context
    modules = [context.get(layer) for layer in layers]
    names = ("_k_scale_float", "_v_scale_float", "_q_scale_float", "_prob_scale_float")
    return ";".join(",".join(str(getattr(module, name, "?")) for name in names) for module in modules)


def model_identity(model_config: Any) -> tuple[str, str, str]:
    """Return (model, revision, tokenizer): a path or a hub id each, "" where vLLM has none."""
    return str(model_config.model), str(model_config.revision or ""), str(model_config.tokenizer or "")
