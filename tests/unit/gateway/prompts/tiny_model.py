"""A model directory with a tiny tokenizer, for tests: byte-level, so that every text has ids. With a config engines load it."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

BOS, EOS = "<s>", "</s>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 8192,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}
"""Two small layers; the weights are for the engine to make up."""


def tiny_tokenizer() -> Tokenizer:
    """Ids 0 and 1 are BOS and EOS, then the 256 bytes and one merge, "th"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([BOS, EOS, *letters, "th"])}
    tokenizer = Tokenizer(BPE(vocabulary, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def make_model(directory: Path, *, tokenizer: Tokenizer | None = None, template: str | None = TEMPLATE, **config: Any) -> Path:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; `config` goes into the second."""
    directory.mkdir(parents=True, exist_ok=True)
    (tokenizer or tiny_tokenizer()).save(str(directory / "tokenizer.json"))
    settings = {"bos_token": BOS, "eos_token": {"__type": "AddedToken", "content": EOS}, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, "utf-8")
    return directory


def make_llama(directory: Path) -> Path:
    """Write a model that an engine can load with made-up weights."""
    make_model(directory)
    (directory / "config.json").write_text(json.dumps(LLAMA), "utf-8")
    return directory
