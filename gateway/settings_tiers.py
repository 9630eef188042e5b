"""The settings of the tiers below the replicas' own memory: host memory, disk, vault."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pydantic import ByteSize, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings

from engine.replicas.launch import EngineSettings
from engine.tiers.ages import TTL_SECONDS_MAX
from gateway.settings_types import AbsolutePath, SizeOrAuto

_ENGINE: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(EngineSettings)}
"""The defaults of what the supervisor is given, stated there."""
STAGING_BYTES_MIN = 1 << 20


class Tiers(BaseSettings):
    """Of the settings, those that say where blocks are kept that left the KV caches."""

    host_memory: SizeOrAuto = Field(
        "auto",
        description="memory, such as 16GiB, that keeps what left the KV caches, for all replicas;"
        " auto: a quarter of what is free at the start; 0: none",
    )
    host_memory_dir: AbsolutePath | None = Field(
        _ENGINE["host_memory_dir"],
        description="directory in shared memory, such as /dev/shm/kept, in whose files what left the KV caches outlives"
        " a restart of everything but the machine, where host_memory is a size; unset: it ends with peerkv",
    )
    host_memory_ttl_seconds: float = Field(
        _ENGINE["host_memory_ttl_seconds"],
        ge=0,
        le=TTL_SECONDS_MAX,
        description="time that host memory keeps a block at most, by its replica's next step; 0: without end",
    )
    disk: AbsolutePath | None = Field(
        _ENGINE["disk"], description="directory that keeps what leaves host memory, also across restarts; unset: none"
    )
    disk_bytes: ByteSize = Field(_ENGINE["disk_bytes"], ge=0, description="size of what the disk keeps at most")
    disk_ttl_seconds: float = Field(
        _ENGINE["disk_ttl_seconds"],
        ge=0,
        le=TTL_SECONDS_MAX,
        description="time that the disk keeps a block at most; 0: without end",
    )
    vault: SecretStr | None = Field(
        None,
        description="Valkey server that keeps what leaves host memory, for several nodes, such as valkey://user:password@host:6379;"
        " valkeys: with TLS; unset: none",
    )
    vault_password_file: AbsolutePath | None = Field(None, description="file with the vault's password")
    vault_ca_file: AbsolutePath | None = Field(
        None, description="file of certificates that vouch for the vault; unset: the system's"
    )
    vault_ttl_seconds: float = Field(
        _ENGINE["vault_ttl_seconds"],
        ge=0,
        le=TTL_SECONDS_MAX,
        description="time that the vault keeps a block at most; 0: until it is full",
    )
    tier_codec: Literal["raw-z", "raw"] = Field(
        _ENGINE["tier_codec"], description="how disk and vault keep blocks, both exact: compressed, or as they are"
    )
    lossy: Literal["", "int8", "rot4", "rot3"] = Field(
        _ENGINE["lossy"],
        description="how blocks of callers who accept loss are kept in host memory, on disk and in a vault: in half the space"
        " (int8), or with 4 or 3 bits a number, which answers show; empty: as all others",
    )
    tier_secret_file: AbsolutePath | None = Field(
        None, description="file with a secret: with it, what disk and vault keep is encrypted; nodes of a vault need the same"
    )
    tier_tenant_share_max: float = Field(
        _ENGINE["tier_tenant_share_max"],
        gt=0,
        le=1,
        description="share of host memory, and of the disk, that a tenant's blocks have at most while others want room",
    )
    tier_staging_bytes: SizeOrAuto = Field(
        "auto",
        description="memory for what comes up from the disk, and as much for the vault; auto: 256 MiB, 4 GiB on GPUs",
    )
    tier_wait_seconds_max: float = Field(
        1.0, ge=0, description="time that a request waits for disk and vault at most; 0: nothing is asked of them"
    )

    @field_validator("lossy", mode="before")
    @classmethod
    def _check_lossy(cls, value: object) -> object:
        if value in ("mix", "neurokv"):
            raise ValueError(
                f"{value} goes by how much of a sequence comes behind a block, which is not known of one that leaves a cache:"
                " choose 'int8', 'rot4' or 'rot3'; `peerkv quality` measures it"
            )
        return value

    @field_validator("tier_staging_bytes")
    @classmethod
    def _check_staging(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < STAGING_BYTES_MIN:
            raise ValueError(f"{value} bytes hold nothing: write a unit, such as 4GiB, or auto")
        return value
