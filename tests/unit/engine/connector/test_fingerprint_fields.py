"""What a worker tells of its KV: replicas whose blocks hold other layers, or other groups of them, exchange nothing."""

from types import SimpleNamespace

import torch

from engine.connector.fingerprint_fields import worker_fields

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
