"""The settings of several models behind one gateway: `[[models]]` tables, each for a fleet of its own."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator
from pydantic_settings import BaseSettings

from engine.replicas.launch import EngineSettings
from gateway.settings_types import AbsolutePath, ReplicaCount, SizeOrAuto, VllmArgs, Words

_FLEET_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
_ENGINE: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(EngineSettings)}


class ModelSettings(BaseModel):
    """One model and its replicas. What is not here is set for all models together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="directory or hub id of the model that vLLM loads")
    name: str = Field(
        "", description="begins the names of its replicas and directories; empty: made of the name that clients use"
    )
    served_model_name: str = Field("", description="model name that clients use; empty: the model as given")
    model_aliases: Words = Field((), description="further names of the model")
    replicas: ReplicaCount = Field("auto", description="number of replicas, as for one model")
    replicas_per_gpu: int = Field(
        _ENGINE["replicas_per_gpu"], ge=1, le=16, description="replicas that share a GPU and its memory"
    )
    devices: tuple[str, ...] = Field(
        (), description="GPUs of its replicas, as CUDA_VISIBLE_DEVICES names them; none: the next ones that are left"
    )
    vllm_args: VllmArgs = Field((), description="additional arguments for its vLLM servers; they override ours")
    host_memory: SizeOrAuto = Field(
        "auto", description="memory that keeps what left its KV caches; auto: its part of what is safe; 0: none"
    )
    disk: AbsolutePath | None = Field(None, description="directory that keeps what leaves its host memory; unset: none")
    disk_bytes: ByteSize = Field(_ENGINE["disk_bytes"], ge=0, description="size of what the disk keeps at most")

    @property
    def client_name(self) -> str:
        """What clients call it."""
        return self.served_model_name or self.model

    @property
    def fleet_name(self) -> str:
        """What its replicas' names begin with; "" if its model's name does not make one."""
        made = re.sub(r"[^a-z0-9]+", "-", self.client_name.rpartition("/")[2].lower())[:32].strip("-")
        return self.name or made

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if value and not _FLEET_NAME.fullmatch(value):
            raise ValueError("lower-case letters, digits and dashes within, 32 at most")
        return value

    @field_validator("devices", mode="before")
    @classmethod
    def _name_devices(cls, value: Any) -> Any:
        """GPUs may be numbers, as TOML has them."""
        return tuple(map(str, value)) if isinstance(value, list | tuple) else value


OF_EACH = frozenset(ModelSettings.model_fields) - {"name", "devices"}
"""What is said of each model where there are several, and for all where there is one."""


class SeveralModels(BaseSettings):
    """Of the settings, those of several models."""

    models: tuple[ModelSettings, ...] = Field(
        (), description="several models, each with replicas of its own, as [[models]] in the file; none: the one named by model"
    )


def check_models(models: tuple[ModelSettings, ...], given: frozenset[str], node_name: str) -> None:
    """Raise ValueError if these cannot stand beside each other, or beside the settings `given` for all."""
    if not models:
        return
    if both := sorted(OF_EACH & given):
        raise ValueError(f"{both[0]}: beside [[models]] it belongs into each of these tables, and not before them")
    if node_name:
        raise ValueError("node_name: a node among others serves one model, and there are [[models]]")
    for one in models:
        if not one.fleet_name:
            raise ValueError(
                f"models: '{one.client_name}' needs a name, such as name = \"chat\", which its replicas' begin with"
            )
    names = [name for one in models for name in {one.client_name, *one.model_aliases}]
    _once(names, "two models are called")
    _once([one.fleet_name for one in models], "two models have the name")
    _once([device for one in models for device in set(one.devices)], "two models are given the GPU")
    _once([str(one.disk) for one in models if one.disk is not None], "two models are given the disk")


def _once(words: list[str], what: str) -> None:
    seen: set[str] = set()
    for word in words:
        if word in seen:
            raise ValueError(f"models: {what} '{word}'")
        seen.add(word)


def values_of(one: ModelSettings) -> dict[str, Any]:
    """The settings of one model by name, as they are where it is the only one."""
    values = {name: getattr(one, name) for name in OF_EACH}
    return values | {"served_model_name": one.client_name}
