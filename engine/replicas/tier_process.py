"""The process of the frame tiers, as the supervisor keeps it: started with the replica host, and again when it ends."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from engine.frame_tiers.config import VARIABLE, TierConfig, encode_config
from engine.frame_tiers.messages import SOCKET
from engine.host_process.messages import Spawn
from engine.replicas.launch import EngineSettings

NAME = "frame-tiers"
BACKOFF_SECONDS_MIN, BACKOFF_SECONDS_MAX = 1.0, 60.0
HEALTHY_SECONDS = 60.0
"""After running for so long, the next end is answered at once again."""


@dataclass(slots=True)
class TierProcess:
    """`env` is what all processes of the host get. Times are of the supervisor's clock, seconds."""

    settings: EngineSettings
    env: Mapping[str, str]
    running: bool = False
    restarts: int = 0
    _began: float = 0.0
    _backoff: float = BACKOFF_SECONDS_MIN

    def spawn(self, now: float) -> Spawn:
        """Return the command that starts it, for the host."""
        settings = self.settings
        self.running, self._began = True, now
        return Spawn(
            name=NAME,
            argv=(sys.executable, "-m", "engine.frame_tiers"),
            env={**self.env, VARIABLE: encode_config(tier_config(settings))},
            socket=str(settings.run_dir / SOCKET),
            scratch=str(settings.run_dir / NAME),
            log=str(settings.log_dir / "tiers.log"),
            log_bytes_max=settings.log_bytes_max,
            program=True,
        )

    def ended(self, now: float) -> float:
        """It ended; return after how many seconds to start it again."""
        if now - self._began >= HEALTHY_SECONDS:
            self._backoff = BACKOFF_SECONDS_MIN
        wait, self._backoff = self._backoff, min(2 * self._backoff, BACKOFF_SECONDS_MAX)
        self.running = False
        self.restarts += 1
        return wait


def tier_config(settings: EngineSettings) -> TierConfig:
    """Return what the process is told."""
    return TierConfig(
        socket=str(settings.run_dir / SOCKET),
        table_dir=str(settings.table_dir),
        staging_bytes=settings.staging_bytes,
        codec=settings.tier_codec,
        lossy=settings.lossy,
        secret_file=str(settings.tier_secret_file or ""),
        disk=str(settings.disk or ""),
        disk_bytes=int(settings.disk_bytes),
        disk_ttl_seconds=settings.disk_ttl_seconds,
        tenant_share_max=settings.tier_tenant_share_max,
        pin_share_max=settings.pin_share_max,
        vault=settings.vault,
        vault_password_file=str(settings.vault_password_file or ""),
        vault_ca_file=str(settings.vault_ca_file or ""),
        vault_ttl_seconds=settings.vault_ttl_seconds,
    )
