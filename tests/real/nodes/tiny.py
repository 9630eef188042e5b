"""A model for hosts that a machine can run several of: it starts in seconds, and prompts are computed in one."""

from pathlib import Path

from tests.real.nodes.hosts import Served
from tests.real.test_several_models import tiny

LAYERS = 3
WIDE = 8192
"""Computing a prompt has to take longer than fetching its KV, on a busy machine too: else it is computed, as it should be."""


def tiny_served(folder: Path) -> Served:
    """Write the model into a folder and say how it is served."""
    model = tiny(folder, LAYERS, intermediate_size=WIDE)
    args = ("--dtype", "float32", "--max-model-len", "8192", "--kv-cache-memory-bytes", "64M")
    return Served(str(model), "tiny", (), args)
