"""A model on the CPU in float32, whose prefix cache is KV as it would be in an engine: rounded to bfloat16."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import transformers

from engine.quality.arms import Arm
from engine.quality.coded_prefix import floats
from engine.quality.errors import QualityNotMeasured

PIECE_TOKENS = 64
"""The noise floor is a prefix that was computed in pieces of so many tokens."""
Bits = npt.NDArray[np.uint16]
P = ParamSpec("P")
T = TypeVar("T")


def _without_gradients(method: Callable[P, T]) -> Callable[P, T]:
    wrapped: Callable[P, T] = torch.inference_mode()(method)
    return wrapped


class Model:
    """`directory` holds a causal language model with full attention in all layers. Raises QualityNotMeasured."""

    def __init__(self, directory: Path) -> None:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))  # threads that wait for a busy core cost ten times that
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        except (OSError, ValueError, KeyError) as error:
            raise QualityNotMeasured(f"{directory} cannot be loaded by transformers: {error}") from error

    def token_ids(self, text: str) -> npt.NDArray[np.int64]:
        """Return a text's token ids."""
        return np.array(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)

    @_without_gradients
    def prefix(self, tokens: npt.NDArray[np.int64]) -> tuple[Bits, npt.NDArray[np.float64]]:
        """Return a prefix's KV (layers, heads, tokens, 2, dim), bfloat16 bits, and each token's attention in the last layer."""
        out = self._model(torch.from_numpy(tokens)[None], use_cache=True, output_attentions=True, logits_to_keep=1)
        attention = out.attentions[-1][0].sum(dim=(0, 1), dtype=torch.float64)
        return _bits(out.past_key_values, len(tokens)), np.asarray(attention)

    @_without_gradients
    def prefix_in_pieces(self, tokens: npt.NDArray[np.int64]) -> Bits:
        """Return the KV of a prefix, computed a piece after the other."""
        cache = transformers.DynamicCache()
        for begin in range(0, len(tokens), PIECE_TOKENS):
            piece = torch.from_numpy(tokens[begin : begin + PIECE_TOKENS])[None]
            self._model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return _bits(cache, len(tokens))

    @_without_gradients
    def follow(self, arms: Sequence[Arm], last: int, given: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return each arm's log-probabilities (arms, n, vocabulary) of `given` tokens (n,) behind a prefix and token `last`."""
        asked = torch.from_numpy(np.concatenate(([last], given[:-1])))[None].expand(len(arms), -1)
        logits = self._model(asked, past_key_values=_cache(arms), use_cache=True, **_places(arms, len(given), 0)).logits
        found: npt.NDArray[np.float32] = torch.log_softmax(logits, dim=-1).numpy()
        return found

    @_without_gradients
    def continue_greedily(self, arms: Sequence[Arm], last: int, count: int) -> npt.NDArray[np.int64]:
        """Return the likeliest `count` tokens of each arm (arms, count), one by one, behind a prefix and token `last`."""
        cache, token, found = _cache(arms), torch.full((len(arms), 1), last), []
        for step in range(count):
            logits = self._model(token, past_key_values=cache, use_cache=True, **_places(arms, 1, step)).logits
            token = logits[:, -1].argmax(dim=-1, keepdim=True)
            found.append(token)
        tokens: npt.NDArray[np.int64] = torch.cat(found, dim=1).numpy()
        return tokens


def _bits(cache: Any, tokens: int) -> Bits:
    """Raises QualityNotMeasured unless all layers keep all tokens, in the same shape."""
    layers: list[Any] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    shapes = {() if part is None else tuple(part.shape) for layer in layers for part in layer}
    if len(shapes) != 1 or next(iter(shapes))[2:3] != (tokens,):
        raise QualityNotMeasured("only models with the same full attention in all layers can be measured")
    pairs = torch.stack([torch.stack((keys[0], values[0]), dim=2) for keys, values in layers])
    bits: Bits = pairs.to(torch.bfloat16).view(torch.uint16).numpy()
    return bits


def _cache(arms: Sequence[Arm]) -> Any:
    """A fresh cache with a row for each arm."""
    cache = transformers.DynamicCache()
    for layer in range(len(arms[0].bits)):
        rows = torch.from_numpy(np.stack([floats(arm.bits[layer]) for arm in arms]))
        cache.update(rows[:, :, :, 0].contiguous(), rows[:, :, :, 1].contiguous(), layer)
    return cache


def _places(arms: Sequence[Arm], count: int, done: int) -> dict[str, Any]:
    """What the next `count` tokens attend to and their positions, `done` tokens behind the prefix."""
    stays = torch.from_numpy(np.stack([arm.stays for arm in arms]).astype(np.int64))
    mask = torch.cat((stays, torch.ones(len(arms), done + count, dtype=torch.int64)), dim=1)
    first = torch.tensor([[arm.position + done] for arm in arms])
    return {"attention_mask": mask, "position_ids": first + torch.arange(count)[None]}
