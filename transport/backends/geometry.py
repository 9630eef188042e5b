"""Where each block of each layer lies in memory, read off the KV tensors that vLLM registered."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transport.errors import MemoryUnreachable


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """Block b of a layer is `bytes` dense bytes at address `base + b * stride`; `storage` is the tensor's allocation."""

    storage: Any
    offset: int
    stride: int
    bytes: int
    group: int = 0


def layer_geometries(
    kv_caches: Mapping[str, Any], num_blocks: int, groups: Mapping[str, int] | None = None
) -> list[LayerGeometry]:
    """Return one geometry a layer, of `kv_caches` (torch tensors whose first dimension counts blocks).

    They are in the order of their groups, in each by the bytes of a block, and else in that of `kv_caches`; `groups` tells
    each layer's, None that there is one. Layers that share their memory come once. A tensor may hold several kernel blocks for
    each of the engine's `num_blocks`. Raises MemoryUnreachable for a layout in which a block is not one dense run of bytes.
    """
    layers: dict[tuple[int, int, int], LayerGeometry] = {}
    for name, tensor in kv_caches.items():
        group = groups.get(name) if groups is not None else 0
        if group is None:
            raise MemoryUnreachable(f"{name} is in no KV cache group")
        rows = int(tensor.shape[0])
        if rows % num_blocks:
            raise MemoryUnreachable(f"{name}: {rows} rows cannot hold {num_blocks} blocks; use a layout with blocks outermost")
        ratio = rows // num_blocks
        item = int(tensor.element_size())
        row_bytes = int(tensor.numel()) // rows * item
        row_stride = int(tensor.stride(0)) * item
        inner = sum((size - 1) * step for size, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)) + 1
        if inner * item != row_bytes or row_stride < row_bytes or (ratio > 1 and row_stride != row_bytes):
            raise MemoryUnreachable(
                f"{name}: shape {tuple(tensor.shape)}, strides {tensor.stride()}: a block is not one dense run"
            )
        offset = int(tensor.storage_offset()) * item
        geometry = LayerGeometry(tensor.untyped_storage(), offset, row_stride * ratio, row_bytes * ratio, group)
        layers.setdefault((geometry.storage.data_ptr(), offset, group), geometry)
    if not layers:
        raise MemoryUnreachable("the engine registered no KV tensors")
    return sorted(layers.values(), key=lambda layer: (layer.group, layer.bytes))
