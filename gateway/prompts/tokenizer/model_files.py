"""Where a model's tokenizer files lie, and what they say. Nothing is ever downloaded here."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

JSON_BYTES_MAX = 64 << 20
TEMPLATE_BYTES_MAX = 4 << 20
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Models by `model_type` or architecture that do not use HfRenderer, or for chats not even that.
_OWN_RENDERERS = frozenset(
    (
        *("gpt_oss", "MoonshotKimiaForCausalLM", "KimiK3ForConditionalGeneration", "DeepseekV32ForCausalLM"),
        *("DeepseekV4ForCausalLM", "DeepseekV4ForConditionalGeneration", "DeepseekV41ForCausalLM"),
        *("InklingForCausalLM", "InklingForConditionalGeneration"),
    )
)


class ModelFilesError(Exception):
    """The tokenizer files are missing or unusable: requests are steered without token ids."""


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """What decides which tokenizer and chat template the engine uses."""

    model: str  # a directory or a hub id
    revision: str = ""
    cache_dir: str = ""  # vLLM's --download-dir
    chat_template: str = ""  # a path or the template itself
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    content_format: str = "auto"
    mode: str = "auto"
    exclude_tools: bool = False  # vLLM's --exclude-tools-when-tool-choice-none
    config_of: str = ""  # the model whose config.json chooses the engine's renderer; empty: `model`
    unlike: str = ""  # why no token ids are known here, whatever the files say


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The content of a model's tokenizer files.

    `templates` are chat templates by name, "default" first of all; `special_tokens` the named ones, such as bos_token.
    """

    directory: Path
    config: Mapping[str, Any]
    special_tokens: Mapping[str, str]
    templates: Mapping[str, str]

    @property
    def tokenizer(self) -> Path:
        return self.directory / "tokenizer.json"


def find_directory(source: TokenizerSource, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the directory with the model's files: itself, or the snapshot of a hub id in the local cache.

    Raises ModelFilesError if there is none (yet).
    """
    local = Path(source.model).expanduser()
    if local.is_dir():
        return local
    if local.is_absolute() or source.model.count("/") > 1:
        raise ModelFilesError(f"{source.model} is not a directory")
    cache = Path(source.cache_dir) if source.cache_dir else _hub_cache(environment)
    repository = cache / ("models--" + source.model.replace("/", "--"))
    revision = source.revision or "main"
    try:
        commit = (repository / "refs" / revision).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        commit = revision
    snapshot = repository / "snapshots" / commit
    if not snapshot.is_dir():
        raise ModelFilesError(f"{source.model} at revision {revision} is not in {cache}")
    return snapshot


def _hub_cache(environment: Mapping[str, str]) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(name):
            return Path(environment[name]).expanduser()
    if environment.get("HF_HOME"):
        return Path(environment["HF_HOME"]).expanduser() / "hub"
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def read_model_files(source: TokenizerSource, environment: Mapping[str, str] = os.environ) -> ModelFiles:
    """Read the small files beside tokenizer.json. Raises ModelFilesError if that one is absent or another is broken."""
    directory = find_directory(source, environment)
    if not (directory / "tokenizer.json").is_file():
        raise ModelFilesError(f"{directory} has no tokenizer.json")
    config = read_json(directory / "tokenizer_config.json")
    named = {**read_json(directory / "special_tokens_map.json"), **config}
    special = {name: text for name in NAMED_TOKENS if (text := token_text(named.get(name)))}
    given = source.chat_template
    templates = _given_template(given) if given else _find_templates(directory, config)
    return ModelFiles(directory, config, special, templates)


def renderer_of_its_own(source: TokenizerSource, environment: Mapping[str, str] = os.environ) -> str:
    """Say why the engine renders this model's chats in another way than with its template; "" if it does not.

    As vLLM 0.32 chooses: vllm/config/model.py, vllm/tokenizers/registry.py, and Harmony in vllm/renderers/online_renderer.py.
    Raises ModelFilesError if the files cannot be read.
    """
    directory = find_directory(source, environment)
    if any(directory.glob("consolidated*.safetensors")) and any(
        (*directory.glob("tekken.json"), *directory.glob("tokenizer.model.v*"))
    ):
        return "the engine renders chats with Mistral's own tokenizer"
    config = read_json(find_directory(replace(source, model=source.config_of or source.model), environment) / "config.json")
    architectures = config.get("architectures")
    names = [config.get("model_type"), *(architectures if isinstance(architectures, list) else ())]
    found = next((name for name in names if name in _OWN_RENDERERS), None)
    return f"the engine renders chats of {found} in its own way" if found else ""


def token_text(entry: object) -> str:
    """Return a token as tokenizer_config.json gives it, a string or an object with `content`; "" for anything else."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else ""


def _find_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Template files win over the entry in tokenizer_config.json, which wins over a processor's chat_template.json."""
    found: dict[str, str] = {}
    if (directory / "chat_template.jinja").is_file():
        found["default"] = _read_text(directory / "chat_template.jinja", TEMPLATE_BYTES_MAX)
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = _read_text(path, TEMPLATE_BYTES_MAX)
    if found:
        return found
    entry = config.get("chat_template") or read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(entry, str):
        return {"default": entry}
    if isinstance(entry, list):
        pairs = [(item.get("name"), item.get("template")) for item in entry if isinstance(item, dict)]
        return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    return {}


def _given_template(given: str) -> dict[str, str]:
    """vLLM takes a path first, then the text itself if it looks like a template, then the name of one that it ships."""
    path = Path(given)
    try:
        if path.is_file():
            return {"default": _read_text(path, TEMPLATE_BYTES_MAX)}
    except OSError:
        pass  # a template is not a valid file name
    return {"default": given} if any(mark in given for mark in "{}\n") else {}


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read_text(path, JSON_BYTES_MAX))
    except ValueError as error:
        raise ModelFilesError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ModelFilesError(f"{path} is not a JSON object")
    return content


def _read_text(path: Path, bytes_max: int) -> str:
    try:
        if path.stat().st_size > bytes_max:
            raise ModelFilesError(f"{path} is larger than {bytes_max} bytes")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFilesError(f"{path}: {error}") from error
