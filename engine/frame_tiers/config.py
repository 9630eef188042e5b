"""What the process of the frame tiers is told at its start, in its environment: passwords stand on no command line."""

from pathlib import Path

import msgspec

from engine.frame_tiers.disk.disk_store import DiskStore
from engine.frame_tiers.store import FrameStore, StoreName, StoreRefused
from engine.frame_tiers.vault.address import AddressRefused, parse, with_secrets
from engine.frame_tiers.vault.vault_store import VaultStore

VARIABLE = "PEERKV_FRAME_TIERS"


class TierConfig(msgspec.Struct, frozen=True):
    """Paths are absolute; sizes are in bytes, times in seconds. `disk` or `vault` "" is none; a TTL of 0 is without end."""

    socket: str
    table_dir: str
    staging_bytes: int
    codec: str = "raw-z"
    lossy: str = ""
    secret_file: str = ""
    disk: str = ""
    disk_bytes: int = 0
    disk_ttl_seconds: float = 0.0
    tenant_share_max: float = 1.0
    pin_share_max: float = 0.0
    vault: str = ""
    vault_password_file: str = ""
    vault_ca_file: str = ""
    vault_ttl_seconds: float = 0.0

    @property
    def stores(self) -> tuple[StoreName, ...]:
        """The stores that are wanted, the nearest first."""
        named: tuple[tuple[StoreName, str], ...] = (("disk", self.disk), ("vault", self.vault))
        return tuple(name for name, where in named if where)


def encode_config(config: TierConfig) -> str:
    """Return the value of VARIABLE."""
    return msgspec.json.encode(config).decode()


def decode_config(value: str) -> TierConfig:
    """The inverse of `encode_config`. Raises msgspec.MsgspecError."""
    return msgspec.json.decode(value, type=TierConfig)


def open_store(config: TierConfig, name: StoreName) -> FrameStore:
    """Open one of the stores that are wanted. Raises StoreRefused."""
    if name == "disk":
        return DiskStore(
            Path(config.disk),
            config.disk_bytes,
            ttl_seconds=config.disk_ttl_seconds,
            tenant_share_max=config.tenant_share_max,
            pin_share_max=config.pin_share_max,
        )
    try:
        address = with_secrets(
            parse(config.vault),
            Path(config.vault_password_file) if config.vault_password_file else None,
            Path(config.vault_ca_file) if config.vault_ca_file else None,
        )
        return VaultStore(address, ttl_seconds=config.vault_ttl_seconds)
    except (AddressRefused, OSError) as error:
        raise StoreRefused(str(error)) from error
