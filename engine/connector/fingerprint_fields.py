"""Everything that changes the bytes of a KV block, as fields that two replicas compare by name."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash

from engine.connector import compat
from transport.groups import Group

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "tekken.json")
_MEDIA = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_READ_BYTES = 1 << 24


def scheduler_fields(vllm_config: Any, groups: tuple[Group, ...], hash_name: str) -> dict[str, str]:
    """Return the fields that the engine's configuration decides; `groups` are its KV cache groups."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    name, revision, tokenizer = compat.model_identity(model)
    load = vllm_config.load_config
    folder = model_folder(name, revision, load.download_dir)
    config = {key: value for key, value in model.hf_config.to_dict().items() if not key.startswith("_")}
    config.pop("transformers_version", None)
    return {
        "vllm": compat.vllm_version(),
        "torch": str(torch.__version__),
        "weights": f"dummy, seed {model.seed}" if str(load.load_format) == "dummy" else weights_digest(folder, name),
        "media": _files_digest(_files(folder, _MEDIA)) + _text(getattr(model, "mm_processor_kwargs", None)),
        "revision": revision,
        "model config": _digest(_text(config).encode()),
        "rope": _text(
            getattr(model.hf_text_config, "rope_parameters", None) or getattr(model.hf_text_config, "rope_scaling", "")
        ),
        "tokenizer": _files_digest(_files(model_folder(tokenizer, revision, load.download_dir), _TOKENIZER)) or tokenizer,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "kv dtype": str(cache.cache_dtype),
        "groups": "; ".join(map(describe, groups)),
        "tensor parallel size": str(parallel.tensor_parallel_size),
        "pipeline parallel size": str(parallel.pipeline_parallel_size),
        "hash": hash_name,
    }


def describe(group: Group) -> str:
    """Return what a group is, in words that are equal when its blocks are."""
    kind = "full attention" if group.kind == "full" else group.kind
    window = f" of {group.window} tokens" if group.window else ""
    return f"{group.layers} layers of {kind}{window}, {group.block_size} tokens and {group.bytes} bytes a block"


def worker_fields(
    vllm_config: Any, kv_caches: dict[str, torch.Tensor], layer_groups: Mapping[str, int] | None = None
) -> dict[str, str]:
    """Return the fields that a worker knows: device, attention backend, shape and strides of a block, KV scales.

    `layer_groups` tells the KV cache group of each layer, if the groups are handled.
    """
    names, groups = list(kv_caches), layer_groups or {}
    layouts = {_layout(kv_caches[name]) for name in names}
    backends = {compat.attention_backend(vllm_config, name) for name in names}
    device = next(iter(kv_caches.values())).device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": kind,
        "attention backend": ", ".join(sorted(backends)),
        "cpu layout": compat.cpu_layout(vllm_config, names) if device.type == "cpu" else "",
        "strides": "; ".join(sorted(layouts)),
        "layer names": _digest("\0".join(f"{name} {groups.get(name)}" for name in names).encode()),
        "kv scales": compat.kv_scales(vllm_config, names),
    }


def _layout(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape[1:])} {tuple(tensor.stride())}"


def model_folder(model: str, revision: str, download_dir: str | None = None) -> Path | None:
    """Return where the files of a model lie: its own directory, or the hub cache's snapshot; None if neither is there."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", cache_dir=download_dir, revision=revision or None)
    return Path(found).parent if isinstance(found, str) else None


def weights_digest(folder: Path | None, name: str) -> str:
    """Return a digest over the content of all weight files, "" if there are none; remembered by path, size and time."""
    one = Path(name).expanduser()
    return _files_digest([one] if one.is_file() else _files(folder, _WEIGHTS))


def _files(folder: Path | None, endings: tuple[str, ...]) -> list[Path]:
    if folder is None:
        return []
    return sorted(path for path in folder.iterdir() if path.name.endswith(endings) and path.is_file())


def _files_digest(files: list[Path]) -> str:
    if not files:
        return ""
    total = xxhash.xxh3_128()
    for path in files:
        total.update(f"{path.name}\0{_file_digest(path)}\0".encode())
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    found = path.stat()
    note = _notes() / _digest(f"{path.resolve()}\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_ino}".encode())
    try:
        known = note.read_text()
        if len(known) == 32:
            return known
    except OSError:
        known = ""
    digest = xxhash.xxh3_128()
    with path.open("rb") as source:
        while data := source.read(_READ_BYTES):
            digest.update(data)
    _remember(note, digest.hexdigest())
    return digest.hexdigest()


def _notes() -> Path:
    base = os.environ.get("PEERKV_CACHE") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "peerkv" / "digests"


def _remember(note: Path, digest: str) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_suffix(f".{os.getpid()}")
        draft.write_text(digest)
        draft.rename(note)
    except OSError:
        return  # it is computed again next time


def _text(value: Any) -> str:
    return msgspec.json.encode(msgspec.to_builtins(value, str_keys=True, enc_hook=str), order="sorted").decode()


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)
