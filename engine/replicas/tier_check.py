"""Whether disk and vault can be used as they are asked for, as far as that is known before anything starts."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from engine.replicas.free_memory import free_bytes
from engine.replicas.launch import EngineSettings, LaunchRefused


def check_tiers(*fleets: EngineSettings, sized_later: bool = False) -> None:
    """Raise LaunchRefused for a disk that cannot be had, for loss without what keeps it, and for files of no memory.

    `sized_later`: how much host memory a fleet has is not known yet, so it may be what keeps loss; see `loss_without_room`.
    """
    sharing = [each for each in fleets if each.connector]
    for each in sharing:
        if each.disk is not None and (why := _unusable(each.disk)):
            raise LaunchRefused(f"disk: {each.disk} cannot be used: {why}")
    if any(each.host_memory_dir for each in sharing) and not any(each.host_memory_bytes_each for each in sharing):
        raise LaunchRefused("host_memory_dir: there is no host memory to keep in it: give host_memory a size, such as 16GiB")
    if not sized_later and not _loss_is_kept(sharing):
        raise LaunchRefused("lossy: there is nothing that keeps blocks with loss: give disk, vault or host_memory")


def loss_without_room(*fleets: EngineSettings) -> str:
    """Return the warning that there turned out to be no memory for what is to be kept with loss; "" if it is kept."""
    if _loss_is_kept([each for each in fleets if each.connector]):
        return ""
    free = free_bytes() >> 20
    return f"lossy: memory is short ({free} MiB are free), so there is no host memory and nothing is kept with loss"


def _loss_is_kept(sharing: Sequence[EngineSettings]) -> bool:
    """Whether one of the fleets keeps blocks with loss, or none is to."""
    return not any(each.lossy for each in sharing) or any(each.frame_tiers or each.host_memory > 0 for each in sharing)


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
