"""The fleets that the settings want: one, or one for each of several models, each with settings and GPUs of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.replicas.devices import NotEnoughDevices
from engine.replicas.launch import EngineSettings, devices_each
from engine.replicas.shared_memory_check import safe_host_memory
from gateway.settings import Settings, engine_settings
from gateway.settings_models import ModelSettings, values_of


def each_fleet(settings: Settings) -> tuple[Settings, ...]:
    """The settings of each fleet: those given where there is one model.

    Of several, each fleet has directories of its own: beside those that one alone would have, logs within.
    """
    if not settings.models:
        return (settings,)
    return tuple(_of_model(settings, one) for one in settings.models)


def _of_model(settings: Settings, one: ModelSettings) -> Settings:
    def beside(directory: Path) -> Path:
        return directory.with_name(f"{directory.name}-{one.fleet_name}")

    directories = {"run_dir": beside(settings.run_dir), "table_dir": beside(settings.table_dir)}
    directories["log_dir"] = settings.log_dir / one.fleet_name
    return settings.model_copy(update={**values_of(one), **directories})


def engine_fleets(settings: Settings, fleets: Sequence[Settings], visible: tuple[str, ...]) -> tuple[EngineSettings, ...]:
    """What the supervisor of each fleet gets; `visible` are the GPUs (none: CPU). Raises FleetError."""
    if not settings.models:
        return tuple(engine_settings(each, model=each.model, devices=visible) for each in fleets)
    devices = shared_out(settings.models, visible)
    found = [
        replace(engine_settings(each, model=each.model, devices=own), name=one.fleet_name)
        for each, one, own in zip(fleets, settings.models, devices, strict=True)
    ]
    total = sum(each.replicas for each in found)
    return tuple(replace(each, replicas_beside=total - each.replicas) for each in found)


def with_host_memory(fleets: Sequence[Settings], engines: Sequence[EngineSettings]) -> tuple[EngineSettings, ...]:
    """What the supervisors get: fleets whose host memory is `auto` share what is safe here, less what others are given."""
    wanting = [each.host_memory == "auto" and engine.connector for each, engine in zip(fleets, engines, strict=True)]
    given = sum(engine.host_memory for engine in engines)
    share = max(0, safe_host_memory(*engines) - given) // max(1, sum(wanting))
    return tuple(
        replace(engine, host_memory=share) if wants else engine for engine, wants in zip(engines, wanting, strict=True)
    )


def shared_out(models: Sequence[ModelSettings], visible: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """The GPUs of each model: those it names, else the next ones that are left. Raises NotEnoughDevices."""
    if not visible:
        for one in models:
            if one.devices:
                raise NotEnoughDevices(f"{one.client_name} is given GPUs ({', '.join(one.devices)}), and none can be used here")
        return ((),) * len(models)
    named = {device for one in models for device in one.devices}
    if unknown := sorted(named - set(visible)):
        raise NotEnoughDevices(f"models: there is no GPU {unknown[0]}: there are {', '.join(visible)}")
    left = [device for device in visible if device not in named]
    return tuple(one.devices or _next(one, left) for one in models)


def _next(one: ModelSettings, left: list[str]) -> tuple[str, ...]:
    """Take as many GPUs as a model needs from those that are left."""
    if one.replicas == "auto":
        raise NotEnoughDevices(f"{one.client_name}: say how many replicas it has, or which devices are its own")
    count = devices_each(one.vllm_args) * -(-one.replicas // one.replicas_per_gpu)
    if count > len(left):
        raise NotEnoughDevices(f"{one.client_name} needs {count} GPUs, and {len(left)} are left by the models before it")
    taken, left[:count] = tuple(left[:count]), []
    return taken
