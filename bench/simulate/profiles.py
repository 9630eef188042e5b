"""What simulated engines and links cost. Every figure has a name, and a JSON file can override any of them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError


class ProfileRefused(Exception):
    """A profile file cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """One replica. A step that computes n prompt tokens behind c earlier ones beside B running decodes of C tokens in all takes

        max(prefill_step_seconds_min, prefill_step_seconds + prefill_seconds_token n
            + attention_seconds_pair n (c + n/2) + decodes)

    and one without prompt tokens `decode_step_seconds + decodes`, where decodes is
    `decode_seconds_sequence B + decode_seconds_context_token C`.
    """

    block_tokens: int = 16
    kv_blocks: int = 54000
    kv_bytes_token: int = 131072
    batched_tokens_max: int = 8192
    sequences_max: int = 1024
    prefill_step_seconds_min: float = 0.019
    prefill_step_seconds: float = 0.4e-3
    prefill_seconds_token: float = 22.3e-6
    attention_seconds_pair: float = 0.865e-9
    decode_step_seconds: float = 5.2e-3
    decode_seconds_sequence: float = 8e-6
    decode_seconds_context_token: float = 34e-9
    request_seconds: float = 0.008  # HTTP and tokens on their way into the engine
    request_seconds_token: float = 1.3e-6
    response_seconds: float = 0.001  # from the engine to the client
    contention: float = 0.0  # how much longer a step gets per other computing replica (replicas on one CPU)

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit into the KV cache."""
        return self.kv_blocks * self.block_tokens


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """Copies between replicas, of which `replicas_each_host` share a host. A replica's link has its bandwidth once for what
    leaves and once for what arrives; concurrent copies share it. Within a host that is NVLink (or `within_host_bytes_second`
    of PCIe), across hosts one network card a replica.
    """

    replicas_each_host: int = 8
    within_host_seconds: float = 1.57e-3
    within_host_bytes_second: float = 273e9
    across_hosts_seconds: float = 5e-3
    across_hosts_bytes_second: float = 40e9


@dataclass(frozen=True, slots=True)
class Profile:
    """A machine: how its engines compute and how they copy."""

    name: str
    engine: EngineProfile = EngineProfile()
    links: LinkProfile = LinkProfile()

    @property
    def on_cpu(self) -> bool:
        """Whether the engines compute on CPUs, according to their names."""
        return self.name.startswith("cpu")


H200_LLAMA_8B = Profile("h200-llama-8b")
"""H200s with NVLink, vLLM 0.26.0, Llama of the 8B shape in bf16 (BENCHMARKS.md, sections "Two GPUs").

Prefill: least squares through the cold times of 2,048 to 60,000 tokens, within 0.5 % of each. The shortest step is a prefix
hit's, eager. Copies: what an import took longer than a local hit, least squares over the same sizes. The batch of 8,192 tokens
is vLLM's default for servers on such GPUs. Estimated, not measured: KV, 0.9 of 139 GiB without the weights and 3 GiB of
activations; how a decode step grows with sequences and contexts, from the memory's bandwidth (64 sequences took 6.2 to 6.7 ms);
the network across hosts, 40 of the 50 GB/s that a 400 Gb/s card carries.
"""

H200_PCIE_LLAMA_8B = Profile(
    "h200-pcie-llama-8b", links=LinkProfile(within_host_bytes_second=50e9, across_hosts_bytes_second=20e9)
)
"""The same without NVLink: GPUs read each other over PCIe (gpu.md's 51 to 55 GB/s to and from host memory stand for it)."""

CPU_SMOLLM2 = Profile(
    "cpu-smollm2-135m",
    EngineProfile(
        block_tokens=32,
        kv_blocks=728,
        kv_bytes_token=23040,
        batched_tokens_max=2048,
        sequences_max=16,
        prefill_step_seconds_min=0.03,
        prefill_step_seconds=0.02,
        prefill_seconds_token=1.4e-3,
        attention_seconds_pair=0.8e-6,
        decode_step_seconds=0.025,
        decode_seconds_sequence=0.004,
        decode_seconds_context_token=1e-6,
        request_seconds=0.015,
        request_seconds_token=5e-6,
        response_seconds=0.002,
        contention=0.1,
    ),
    LinkProfile(within_host_seconds=0.01, within_host_bytes_second=1e9),
)
"""Two replicas of the default model on two CPU cores: a start for `tests.real.simulated`, which measures its own."""

PROFILES: Mapping[str, Profile] = {profile.name: profile for profile in (H200_LLAMA_8B, H200_PCIE_LLAMA_8B, CPU_SMOLLM2)}

_ADAPTER = TypeAdapter(Profile)


def adjusted(profile: Profile, changes: Mapping[str, Any]) -> Profile:
    """Return `profile` with `changes`, {"engine": {field: value}, "links": {field: value}}. Raises ProfileRefused."""
    merged = asdict(profile)
    for section, fields in changes.items():
        if section == "name":
            merged["name"] = fields
            continue
        if section not in ("engine", "links") or not isinstance(fields, Mapping):
            raise ProfileRefused(f"a profile has 'name', 'engine' and 'links', not {section!r}")
        unknown = sorted(set(fields) - set(merged[section]))
        if unknown:
            raise ProfileRefused(f"unknown in {section}: {', '.join(unknown)}")
        merged[section] |= fields
    try:
        return _ADAPTER.validate_python(merged)
    except ValidationError as error:
        raise ProfileRefused(str(error)) from error


def read_profile(name: str, path: Path | None) -> Profile:
    """Return the profile of that name, changed by the JSON file at `path`. Raises ProfileRefused."""
    if name not in PROFILES:
        raise ProfileRefused(f"no profile {name!r}, there are {', '.join(PROFILES)}")
    if path is None:
        return PROFILES[name]
    try:
        changes = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ProfileRefused(f"{path}: {error}") from error
    if not isinstance(changes, dict):
        raise ProfileRefused(f"{path}: not a JSON object")
    return adjusted(PROFILES[name], changes)
