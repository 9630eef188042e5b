"""Whether disk and vault can be used as they are asked for, as far as that is known before anything starts."""

import os
import tempfile
from pathlib import Path

from engine.replicas.launch import EngineSettings, LaunchRefused


def check_tiers(*fleets: EngineSettings) -> None:
    """Raise LaunchRefused for a disk that cannot be had, for loss without what keeps it, and for files of no memory."""
    sharing = [each for each in fleets if each.connector]
    for each in sharing:
        if each.disk is not None and (why := _unusable(each.disk)):
            raise LaunchRefused(f"disk: {each.disk} cannot be used: {why}")
    if any(each.host_memory_dir for each in sharing) and not any(each.host_memory_bytes_each for each in sharing):
        raise LaunchRefused("host_memory_dir: there is no host memory to keep in it: give host_memory a size, such as 16GiB")
    if any(each.lossy for each in sharing) and not any(map(_keeps_loss, sharing)):
        raise LaunchRefused("lossy: there is nothing that keeps blocks with loss: give disk, vault or host_memory")


def _keeps_loss(fleet: EngineSettings) -> bool:
    return fleet.frame_tiers or fleet.host_memory > 0


def _unusable(directory: Path) -> str:
    """What keeps it from being made, or written to; "" if nothing does."""
    there = next(each for each in (directory, *directory.parents) if os.path.exists(each))
    if not there.is_dir():
        return f"{there} is no directory"
    try:
        with tempfile.TemporaryDirectory(prefix=".peerkv-", dir=there):
            return ""
    except OSError as error:  # /proc, say, is writable to root by its mode
        return f"{there} cannot be written to ({error.strerror})"
