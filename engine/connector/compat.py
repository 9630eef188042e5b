"""What we read from vLLM's own objects outside its connector interface; works with 0.32 and 0.33."""

import platform
from typing import Any

import torch
import vllm
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.v1.metrics.cache_hit_source import CacheHitSource

PEER_HITS: Any = CacheHitSource.P2P


def transfer_config(connector: Any) -> Any:
    """Return the transfer configuration that vLLM itself reads, in a worker: under MultiConnector, which gives each of its
    connectors a copy, not the connector's own."""
    outer = get_kv_transfer_group() if has_kv_transfer_group() else connector
    return outer._vllm_config.kv_transfer_config


def vllm_version() -> str:
    """Return the version that KV bytes depend on."""
    return str(vllm.__version__)


def attention_backend(vllm_config: Any, layer: str) -> str:
    """Return the name of the attention backend of a layer, which decides how a block is laid out inside."""
    module = vllm_config.compilation_config.static_forward_context.get(layer)
    return str(module.get_attn_backend().get_name()) if module is not None else "unknown"


def cpu_layout(vllm_config: Any, layers: list[str]) -> str:
    """Return how blocks are laid out on the CPU: tensors of one shape hold other tiles on cores with AMX than on others."""
    context = vllm_config.compilation_config.static_forward_context
    found = {str(getattr(context.get(layer), "isa", "")) for layer in layers} - {""}
    return ", ".join(sorted(found)) or f"unknown, of {platform.machine()} with{'' if _has_amx() else 'out'} AMX"


def allow_amx() -> None:
    """Ask the kernel for the tiles of AMX for this process, where the cores have them.

    vLLM 0.32 asks only with its first product of larger matrices. A first step of few tokens, as behind an import, came before
    that, and its attention ended the engine (SIGILL).
    """
    if _has_amx():
        torch.cpu._init_amx()


def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


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
