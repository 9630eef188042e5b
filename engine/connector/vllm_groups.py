"""vLLM's KV cache groups as the table describes them, in the table's order: those that need all blocks come first."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from transport.groups import GROUPS_MAX, Group, Kind, plain, step, unit

_KINDS: Mapping[type, Kind] = {
    FullAttentionSpec: "full",
    MLAAttentionSpec: "full",
    SlidingWindowSpec: "window",
    ChunkedLocalAttentionSpec: "chunk",
    MambaSpec: "state",
}
"""By exact class: derived classes keep other blocks, or keep them differently."""


class GroupNotHandled(ValueError):
    """The model has layers whose blocks are not exchanged; the message says which."""


@dataclass(frozen=True)
class ModelGroups:
    """`groups` in the table's order and `places`, the number that vLLM gives each; `layers` tells each layer's group."""

    groups: tuple[Group, ...]
    places: tuple[int, ...] = (0,)
    layers: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def unit(self) -> int:
        """Tokens that a key stands for."""
        return unit(self.groups)

    @cached_property
    def step(self) -> int:
        """The length of an import is a multiple of this many tokens."""
        return step(self.groups)

    @cached_property
    def plain(self) -> bool:
        """Whether all blocks of a prefix are needed, as in most models: there is a single group with full attention."""
        return plain(self.groups)

    @cached_property
    def restores_states(self) -> bool:
        """Whether an import may begin where full attention's blocks end here, whatever states are here."""
        return {group.kind for group in self.groups} == {"full", "state"}

    def ordered(self, block_ids: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Return vLLM's lists, one a group, in the table's order."""
        return [block_ids[place] for place in self.places]


def model_groups(kv_cache_groups: Iterable[Any]) -> ModelGroups:
    """Describe the groups of vLLM's KV cache configuration. Raises GroupNotHandled."""
    found = [(_group(each), place, each.layer_names) for place, each in enumerate(kv_cache_groups)]
    if not 0 < len(found) <= GROUPS_MAX:
        raise GroupNotHandled(f"the model has {len(found)} KV cache groups")
    found.sort(key=lambda entry: entry[0].kind != "full")
    layers = {name: number for number, (_, _, names) in enumerate(found) for name in names}
    return ModelGroups(tuple(group for group, _, _ in found), tuple(place for _, place, _ in found), layers)


def _group(group: Any) -> Group:
    by_layer = getattr(group.kv_cache_spec, "kv_cache_specs", None)  # of a group whose layers are of several shapes
    specs = list(by_layer.values()) if by_layer else [group.kv_cache_spec]
    if group.host_resident or not group.enable_kv_transfer:
        raise GroupNotHandled(f"blocks of {group.layer_names[0]} lie outside the pool that all groups share")
    if group.role != "default":
        raise GroupNotHandled(f"blocks of {group.layer_names[0]} have a role of their own: {group.role.value}")
    kinds = {_kind(spec) for spec in specs}
    windows = {_window(spec) for spec in specs}
    if len(kinds) != 1 or len(windows) != 1:
        raise GroupNotHandled("a KV cache group mixes layers that need different blocks")
    each = len(group.layer_names) if len(specs) == 1 else 1
    size = sum(_bytes(spec) for spec in specs) * each
    return Group(kinds.pop(), int(specs[0].block_size), windows.pop(), len(group.layer_names), size)


def _kind(spec: Any) -> Kind:
    kind = _KINDS.get(type(spec))
    if kind is None:
        raise GroupNotHandled(f"the model keeps {type(spec).__name__}, which is not handled yet")
    if kind == "state" and spec.mamba_cache_mode != "align":
        raise GroupNotHandled(
            f"states are kept in mode {spec.mamba_cache_mode!r}: only those at the ends of blocks can be exchanged"
        )
    if kind != "state" and spec.tokens_per_state != 1:
        raise GroupNotHandled("the model keeps compressed states, which are not handled yet")
    return kind


def _window(spec: Any) -> int:
    if isinstance(spec, SlidingWindowSpec):
        return int(spec.sliding_window) + int(spec.extra_retained_tokens)
    return int(spec.attention_chunk_size) if isinstance(spec, ChunkedLocalAttentionSpec) else 0


def _bytes(spec: Any) -> int:
    return int(spec.real_page_size_bytes)
