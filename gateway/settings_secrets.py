"""The settings that name files of secrets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import BaseSettings

from gateway.errors import SettingsError
from gateway.secret_files import read_secret
from gateway.settings_types import AbsolutePath

OF_FILE = {"admin_key": "admin_key_file", "tenants": "tenants_file"}
"""Settings that may have their value in a file, and the ones that name it."""


class SecretsInFiles(BaseSettings):
    """Of the settings, the files that hold secrets of the front door."""

    admin_key_file: AbsolutePath | None = Field(None, description="file with the admin key, in place of admin_key")
    tenants_file: AbsolutePath | None = Field(
        None, description="file with the tenants and their API keys as JSON, in place of tenants"
    )
    salt_secret_file: AbsolutePath | None = Field(
        None,
        description="file with the secret that keeps tenants' caches apart; gateways that share blocks need the same; unset: "
        "that of the keys file, else one that is made beside the limits file",
    )


def from_files(levels: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the secret settings that files hold, and the place of each in words.

    `levels` are what is set where, from what beats all others on. Raises SettingsError, never with what a file holds.
    """
    found: dict[str, Any] = {}
    places: dict[str, str] = {}
    for name, of_file in OF_FILE.items():
        level = next((level for level in levels if name in level or of_file in level), {})
        if of_file not in level:
            continue
        if name in level:
            raise SettingsError(f"{name} and {of_file}: give one of them")
        if not isinstance(level[of_file], str | Path):
            continue  # what it has to be is said with all other settings
        path = Path(level[of_file]).expanduser()
        found[name], places[name] = read_secret(path, is_json=name == "tenants"), f"the file {path}:"
    return found, places
