"""What a worker tells of its KV: replicas whose blocks hold other layers, or other groups of them, exchange nothing."""

from types import SimpleNamespace

import torch

from engine.connector import compat
from engine.connector.fingerprint_fields import describe, worker_fields
from transport.fingerprint import fingerprint_difference, fingerprint_digest
from transport.groups import Group

CONFIG = SimpleNamespace(
    compilation_config=SimpleNamespace(static_forward_context={}), cache_config=SimpleNamespace(cache_dtype="auto")
)


def layers_of(names, groups):
    return worker_fields(CONFIG, {name: torch.zeros(2, 4) for name in names}, groups)["layer names"]


def test_the_names_of_layers_their_order_and_their_groups_are_compared():
    same = layers_of("abc", {"a": 0, "b": 1, "c": 1})
    assert layers_of("abc", {"c": 1, "b": 1, "a": 0}) == same
    others = [layers_of("acb", {"a": 0, "b": 1, "c": 1}), layers_of("abd", {"a": 0, "b": 1, "d": 1})]
    others += [layers_of("abc", {"a": 0, "b": 0, "c": 1}), layers_of("abc", {"a": 1, "b": 0, "c": 1}), layers_of("abc", None)]
    assert len({same, *others}) == 6


def test_how_cores_lay_blocks_out_is_compared_as_shapes_do_not_tell(monkeypatch):
    """Two machines that share a vault: the same tensors, in other tiles."""

    def layout(isa):
        context = {"a": SimpleNamespace(isa=isa, get_attn_backend=lambda: SimpleNamespace(get_name=lambda: "CPU_ATTN"))}
        config = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context=context),
            cache_config=SimpleNamespace(cache_dtype="auto"),
        )
        return worker_fields(config, {"a": torch.zeros(2, 4)})["cpu layout"]

    assert [layout("amx"), layout("vec")] == ["amx", "vec"]
    monkeypatch.setattr(compat, "_has_amx", lambda: True)
    assert "with AMX" in layout("")
    monkeypatch.setattr(compat, "_has_amx", lambda: False)
    assert "without AMX" in layout("")


def scales_of(cache_dtype, *layers):
    """What a worker tells of scales that lie in its layers, not in their KV."""
    backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
    context = {f"layer {at}": SimpleNamespace(get_attn_backend=lambda: backend, **layer) for at, layer in enumerate(layers)}
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=context),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
    )
    return worker_fields(config, {name: torch.zeros(2, 4) for name in context})["kv scales"]


def test_scales_of_a_quantised_cache_are_compared_layer_by_layer():
    one = {"_k_scale_float": 1.0, "_v_scale_float": 0.5, "_q_scale_float": 1.0, "_prob_scale_float": 1.0}
    same = scales_of("fp8", one, one)
    assert scales_of("fp8", dict(one), dict(one)) == same
    others = [scales_of("fp8", one | {name: 0.25}, one) for name in one]
    others += [scales_of("fp8", one, one | {"_k_scale_float": 0.25}), scales_of("fp8", one)]
    assert len({same, *others}) == 7
    fields = [{"kv scales": each} for each in (same, others[0])]
    assert fingerprint_difference(*fields)
    assert fingerprint_digest(fields[0]) != fingerprint_digest(fields[1])


def test_without_a_quantised_cache_scales_that_nobody_reads_keep_no_replicas_apart():
    assert {scales_of("auto", {"_k_scale_float": scale}) for scale in (1.0, 0.25)} == {"none"}


def test_a_group_is_told_in_words():
    assert describe(Group("full", 16, 0, 30, 64)) == "30 layers of full attention, 16 tokens and 64 bytes a block"
    assert describe(Group("window", 16, 42, 2, 64)).startswith("2 layers of window of 42 tokens, ")
