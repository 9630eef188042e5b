"""What the chain of a request's keys starts from: everything beside its tokens that its KV depends on."""

from array import array
from typing import Any

from transport.keys import root_key
from transport.lora import adapter_identity


class RootKeys:
    """Makes root keys for requests of an engine with this `fingerprint`."""

    def __init__(self, fingerprint: bytes, hash_name: str) -> None:
        self._fingerprint = fingerprint
        self._hash_name = hash_name
        self._adapters: dict[tuple[str, str], str] = {}

    def of(self, request: Any) -> bytes | None:
        """Return a request's root key; None if there is no text that keys could stand for, or if it may be replaced."""
        if request.pooling_params is not None or request.prompt_embeds is not None or getattr(request, "resumable", False):
            return None
        lora = request.lora_request
        if lora is not None and getattr(lora, "load_inplace", False):
            return None  # an adapter that replaces its own content
        adapter = self._adapter(lora.lora_name, lora.lora_path) if lora else ""
        return root_key(self._fingerprint, request.cache_salt or "", adapter, self._hash_name)

    def _adapter(self, name: str, path: str) -> str:
        """Return how keys name an adapter: as its files were when this engine first saw it."""
        known = self._adapters.get((name, path))
        if known is None:
            known = self._adapters[name, path] = adapter_identity(name, path)
        return known


def extra_content(request: Any, block_size: int) -> dict[int, bytes]:
    """Return what each block depends on beside token ids: which multimodal item lies at which of its positions.

    Source: vLLM's own block keys mix in the same facts (v1/core/kv_cache_utils.py, generate_block_hash_extra_keys).
    """
    extras: dict[int, bytearray] = {}
    for feature in getattr(request, "mm_features", None) or ():
        start, length = feature.mm_position.offset, feature.mm_position.length
        name = str(feature.identifier).encode()
        for block in range(start // block_size, -(-(start + length) // block_size)):
            place = array("q", (len(name), start - block * block_size)).tobytes()
            extras.setdefault(block, bytearray()).extend(place + name)
    return {block: bytes(extra) for block, extra in extras.items()}
