"""The settings of limits that several gateways share."""

from __future__ import annotations

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings

from engine.frame_tiers.vault.address import AddressRefused, VaultAddress, parse, with_secrets
from gateway.errors import SettingsError
from gateway.settings_types import AbsolutePath

_SERVER = "the server"
"""What messages call it."""


class SharedLimitSettings(BaseSettings):
    """Of the settings, those of the server that counts for several gateways."""

    limits_valkey: SecretStr | None = Field(
        None,
        description="Valkey server that counts what keys use for several gateways, such as valkey://user:password@host:6379; "
        "valkeys: with TLS; unset: each counts by itself",
    )
    limits_valkey_password_file: AbsolutePath | None = Field(None, description="file with that server's password")
    limits_valkey_ca_file: AbsolutePath | None = Field(
        None, description="file of certificates that vouch for that server; unset: the system's"
    )
    limits_valkey_wait_seconds_max: float = Field(
        0.25, gt=0, description="time that a request waits for that server at most; then this gateway's own count decides"
    )

    @field_validator("limits_valkey")
    @classmethod
    def _check_limits_address(cls, value: SecretStr | None) -> SecretStr | None:
        try:
            if value is not None:
                parse(value.get_secret_value(), _SERVER)
        except AddressRefused as error:
            raise ValueError(str(error)) from None
        return value


def limits_address(settings: SharedLimitSettings) -> VaultAddress | None:
    """Where the server is, and how to get in; None where each gateway counts by itself. Raises SettingsError."""
    if settings.limits_valkey is None:
        return None
    try:
        address = parse(settings.limits_valkey.get_secret_value(), _SERVER)
        return with_secrets(address, settings.limits_valkey_password_file, settings.limits_valkey_ca_file, _SERVER)
    except AddressRefused as error:
        raise SettingsError(f"limits_valkey: {error}") from None
