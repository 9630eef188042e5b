"""Whether there is a model to load, asked before anything starts: vLLM says so late, three times, under many other lines."""

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path

from engine.fleet import FleetError
from engine.replicas.launch import EngineSettings

HUB_SECONDS_MAX = 6.0
"""For the hub's word on a model; vLLM itself tries for a minute and a half."""
CONFIGS = ("config.json", "params.json")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OFF = frozenset({"", "0", "false", "no", "off"})


class ModelRefused(FleetError):
    """There is no such model, or it cannot be had; the message says what to do."""


async def check_model(settings: EngineSettings, environ: Mapping[str, str]) -> bool:
    """Whether the model has to be taken from the hub's cache, since the hub cannot be reached.

    HUB_SECONDS_MAX at most. Raises ModelRefused. What is neither a path nor a hub's id is left to vLLM.
    """
    model = settings.model
    if await asyncio.to_thread(_is_path, model):
        return False
    if not _HUB_ID.fullmatch(model) or environ.get("VLLM_USE_MODELSCOPE", "").lower() not in _OFF:
        return False
    cached = await asyncio.to_thread(_is_cached, model)
    if environ.get("HF_HUB_OFFLINE", "").lower() not in _OFF:
        if not cached:
            raise ModelRefused(f"HF_HUB_OFFLINE is set, and {model} is not in the hub's cache: unset it, or name a directory")
        return False
    try:
        async with asyncio.timeout(HUB_SECONDS_MAX):
            refusal = await asyncio.to_thread(_ask_hub, model)
    except TimeoutError:
        refusal = f"no answer in {HUB_SECONDS_MAX:g} s"
    if not refusal:
        return False
    if cached:
        return True
    raise ModelRefused(
        f"{model} cannot be had from the hub ({refusal}), and is not a directory: name one, or check the network"
    )


def _is_path(model: str) -> bool:
    """Whether it is one, with a model in it. Raises ModelRefused for a path that holds none."""
    path = Path(model)
    if not path.exists():
        if not model.startswith(("/", ".", "~")):
            return False
        raise ModelRefused(f"there is no model at {path}: name a directory that holds one, or a hub id such as org/name")
    if path.is_dir() and not any((path / name).is_file() for name in CONFIGS) and not any(path.glob("*.gguf")):
        raise ModelRefused(f"{path} holds no model: none of {', '.join(CONFIGS)} is there")
    return True


def _is_cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(model, name), str) for name in CONFIGS)


def _ask_hub(model: str) -> str:
    """Why the hub does not give the model, "" if it does."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(model, CONFIGS[0]), timeout=HUB_SECONDS_MAX)
    except EntryNotFoundError:  # the repository is there
        return ""
    except GatedRepoError:
        return "it is gated: ask for access on its page, and set HF_TOKEN"
    except RepositoryNotFoundError:
        return "there is none of that name, or it is private: set HF_TOKEN"
    except HfHubHTTPError as error:
        return f"its answer is {error.response.status_code}" if error.response is not None else str(error)
    except Exception as error:  # noqa: BLE001  of whatever HTTP library this version of the hub's client uses
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""
