"""`python -m transport.backends.link_probe`: how fast each GPU reads each other one, measured. Prints a JSON list.

A separate program, because it needs torch and CUDA contexts, which the calling process (`peerkv doctor`) must not have.
"""

import json
import sys
import time
from typing import Any

PROBE_BYTES = 512 << 20
ROUNDS = 8


def measure() -> list[dict[str, Any]]:
    """Measure every ordered pair of visible GPUs that can read each other: the best of ROUNDS copies of PROBE_BYTES.

    `reader` copies out of `owner`'s memory, both named by UUID as nvidia-smi spells it; `gb_per_s` is in units of 1e9 bytes
    a second, 0 with the reason in `error`.
    """
    import torch

    count = torch.cuda.device_count()
    names = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count)]
    speeds: list[dict[str, Any]] = []
    for reader, owner in ((a, b) for a in range(count) for b in range(count) if a != b):
        speed, error = 0.0, "no peer access"
        if torch.cuda.can_device_access_peer(reader, owner):
            try:
                speed, error = _gb_per_s(reader, owner), ""
            except RuntimeError as fault:  # torch's own errors of CUDA, out of memory among them
                error = str(fault).splitlines()[0]
        speeds.append({"reader": names[reader], "owner": names[owner], "gb_per_s": speed, "error": error})
    return speeds


def _gb_per_s(reader: int, owner: int) -> float:
    import torch

    source = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=f"cuda:{owner}")
    target = torch.empty_like(source, device=f"cuda:{reader}")
    best = 0.0
    for _ in range(ROUNDS):
        for device in (reader, owner):
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        for device in (reader, owner):
            torch.cuda.synchronize(device)
        best = max(best, PROBE_BYTES / (time.perf_counter() - began) / 1e9)
    return best


if __name__ == "__main__":
    json.dump(measure(), sys.stdout)
