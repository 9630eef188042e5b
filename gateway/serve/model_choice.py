"""The model that is served when none is named: made by `python -m engine.default_model` in its own process."""

from __future__ import annotations

import asyncio
import sys

from engine.default_model.packaged import DEFAULT_NAME
from gateway.errors import GatewayError
from gateway.settings import Settings


class NoModel(GatewayError):
    """The default model is not available."""


async def with_model(settings: Settings) -> Settings:
    """Return the settings with `model` and `served_model_name` filled in. Raises NoModel.

    The first call downloads and converts the default model, with progress on stderr.
    """
    if settings.model or settings.launcher is not None:
        model = settings.model or DEFAULT_NAME
        named = {"model": model, "served_model_name": settings.served_model_name or model}
    else:
        directory = await _make_default_model()
        named = {"model": directory, "served_model_name": settings.served_model_name or DEFAULT_NAME}
    return settings.model_copy(update=named)


async def _make_default_model() -> str:
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "engine.default_model", stdout=asyncio.subprocess.PIPE)
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        if process.returncode is None:
            process.terminate()
            await process.wait()
        raise
    lines = output.decode().split("\n")
    directory = next((line for line in reversed(lines) if line.strip()), "")
    if process.returncode != 0 or not directory:
        raise NoModel("the default model could not be prepared (see above); you can name another one: peerkv serve MODEL")
    return directory
