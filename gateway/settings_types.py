"""Kinds of values that several settings have, with how they are read and checked."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, TypeAdapter, ValidationError
from pydantic_settings import NoDecode

from engine.replicas.vllm_options import refusals

REPLICAS_MAX = 256
_SIZE = TypeAdapter(ByteSize)


def _split(value: object) -> object:
    """Split a string as a shell would, or read it as a JSON list. Both forms come from the environment."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return tuple(json.loads(value))
        except ValueError:
            raise ValueError('begins with [ but is not a JSON list, such as ["one", "two"]') from None
    return tuple(shlex.split(value))


def _check_vllm_args(value: tuple[str, ...]) -> tuple[str, ...]:
    for refusal in refusals(value):
        raise ValueError(refusal)
    return value


def _check_replicas(value: object) -> object:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if value == "auto" or (type(value) is int and 1 <= value <= REPLICAS_MAX):
        return value
    raise ValueError(f"must be 'auto' or a whole number from 1 to {REPLICAS_MAX}")


def _check_size(value: object) -> object:
    if value == "auto":
        return value
    try:
        size = -1 if isinstance(value, bool) else int(_SIZE.validate_python(value))
    except ValidationError:
        size = -1
    if size < 0:
        raise ValueError(f"'{value}' is neither auto nor a size: write bytes, or such as 512MiB, 4GiB")
    return size


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
VllmArgs = Annotated[Words, AfterValidator(_check_vllm_args)]
ReplicaCount = Annotated[int | Literal["auto"], BeforeValidator(_check_replicas)]
AbsolutePath = Annotated[Path, AfterValidator(lambda path: Path(os.path.abspath(path.expanduser())))]
SizeOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_check_size)]
"""A size in bytes, or `auto`: what is safe here."""
