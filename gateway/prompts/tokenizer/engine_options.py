"""What vLLM's arguments say of token ids: where the tokenizer is, and how chats are rendered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise

from gateway.prompts.tokenizer.model_files import TokenizerSource

_VALUED = (
    *("tokenizer", "tokenizer-mode", "tokenizer-revision", "revision", "download-dir", "hf-config-path"),
    *("chat-template", "chat-template-content-format", "default-chat-template-kwargs"),
)
_SWITCHES: Mapping[str, str] = {
    "exclude-tools-when-tool-choice-none": "",
    "enable-prompt-embeds": "the engine's tokenizer has a token more, for prompt embeddings",
    "skip-tokenizer-init": "the engine has no tokenizer",
}
"""Options without a value, and why no ids are known with them, where that is so."""
_NEGATION = "no-"


def source_from_arguments(model: str, vllm_args: Sequence[str]) -> TokenizerSource:
    """Read those of vLLM's arguments that change token ids, as `--name value` or `--name=value`; the last one wins.

    vLLM takes abbreviations, so these count too. A value that vLLM itself will refuse counts as absent.
    """
    given, switches = _given(vllm_args)
    tokenizer = given.get("tokenizer", model)
    revision = given.get("tokenizer-revision", given.get("revision", "") if tokenizer == model else "")
    try:
        defaults = json.loads(given.get("default-chat-template-kwargs", "{}"))
    except ValueError:
        defaults = {}
    return TokenizerSource(
        model=tokenizer,
        revision=revision,
        cache_dir=given.get("download-dir", ""),
        chat_template=given.get("chat-template", ""),
        chat_template_kwargs=defaults if isinstance(defaults, dict) else {},
        content_format=given.get("chat-template-content-format", "auto"),
        mode=given.get("tokenizer-mode", "auto").lower(),
        exclude_tools="exclude-tools-when-tool-choice-none" in switches,
        config_of=given.get("hf-config-path", model if tokenizer != model else ""),
        unlike=next((why for name in switches if (why := _SWITCHES[name])), ""),
    )


def _given(words: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    """The options with their values, and the switches that are on."""
    found: dict[str, str] = {}
    switches: set[str] = set()
    for word, following in pairwise([*words, ""]):
        if not word.startswith("--"):
            continue
        said, equals, value = word[2:].partition("=")
        said = said.replace("_", "-")
        if name := _meant(said, _VALUED):
            found[name] = value if equals else following
        elif name := _meant(said, _SWITCHES):
            switches.add(name)
        elif name := _meant(said.removeprefix(_NEGATION), _SWITCHES):
            switches.discard(name)
    return found, switches


def _meant(said: str, names: Sequence[str] | Mapping[str, str]) -> str:
    """The option that was meant, "" for another one. What fits two, vLLM refuses."""
    if said in names:
        return said
    fitting = [name for name in names if said and name.startswith(said)]
    return fitting[0] if len(fitting) == 1 else ""
