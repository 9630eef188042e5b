"""Assumptions about devices and transports before anything was measured, with the source of each figure."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import NamedTuple


class ModelKey(NamedTuple):
    """The key of prefill terms: a kind of device ("cpu", "cuda") and the model on it (any name, fingerprints do)."""

    device: str
    model: str = ""


class PrefillTerms(NamedTuple):
    """Coefficients of the time to first token, seconds each."""

    fixed: float
    prompt_token: float
    new_token: float
    pair: float
    decode_step: float


PREFILL_FACTORS_MAX = PrefillTerms(inf, inf, inf, inf, 10.0)
"""Decodes coincide with everything else that slows a machine down; their own cost is known well enough to bound it."""


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """Assumptions about a kind of device before anything was measured, with the source of each figure.

    `free_tokens` cost nothing beyond the step that computes one token, because that step reads all weights anyway (roofline).
    Decoding `decodes_full` answers at once makes each of them take twice as long.
    """

    prefill: PrefillTerms
    free_tokens: int
    kv_token_bytes: int
    decodes_full: int


# H200, 8B Llama in bf16, vLLM 0.33.0's server: cold 33 ms at 1,024 tokens, 220 at 8,192, 1,222 at 32,768; hits 24, 31, 57
# (BENCHMARKS.md, "Through whole servers"). 4.8 TB/s against about 600 TFLOP/s in bf16 (2 bytes a weight, 2 operations a
# token) are free_tokens.
_CUDA = DeviceKind(PrefillTerms(0.023, 1.1e-6, 1.75e-5, 1.05e-9, 2e-5), 128, 131072, 256)
# SmolLM2-135M on two CPU cores: 1.786 s at 1,000 tokens, 4.382 at 2,000; hits 0.060 and 0.119 (an earlier run of `make bench`).
# About 150 GFLOP/s against 20 GB/s in float32.
_CPU = DeviceKind(PrefillTerms(0.030, 2.5e-5, 1.3e-3, 8e-7, 1e-2), 16, 46080, 4)
DEVICE_KINDS: Mapping[str, DeviceKind] = {"cuda": _CUDA, "cpu": _CPU}

# (seconds for each import, seconds a byte): CUDA IPC from the 32k-token import of BENCHMARKS.md, shared memory from
# `make bench`, host memory to a GPU from a kernel that reads it by PCIe 5 (51 GB/s, H200), a network of 200 Gbit/s at half its
# rate, disk and vault with `raw-z` from `bench.tiers`.
TRANSPORT_PRIORS: Mapping[str, tuple[float, float]] = {
    "cuda_ipc": (3e-3, 1 / 300e9),
    "shared_memory": (1e-2, 1 / 1.5e9),
    "host_memory": (3e-3, 1 / 50e9),
    "rdma": (1e-2, 1 / 12e9),
    "disk": (3e-3, 1 / 0.8e9),
    "vault": (5e-3, 1 / 0.4e9),
    "tcp": (2e-2, 1 / 0.8e9),  # 10 Gbit/s with TLS, by way of two agents (BENCHMARKS.md has CPU seconds)
}
REMOTE_TRANSPORT = "tcp"
"""How KV comes from another node."""


def device_kind(device: str) -> DeviceKind:
    """Return the assumptions about the device; an unknown kind is treated as a GPU."""
    return DEVICE_KINDS.get(device, _CUDA)
