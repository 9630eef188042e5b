"""A model directory with a tiny tokenizer, for tests: byte-level, so that every text has ids."""

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
