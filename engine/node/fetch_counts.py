"""What came from other nodes and what did not, by node: the agent counts it, and writes it down for the gateway of its node."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec

FETCHES_FILE = "fetches.json"


class FetchCounts(msgspec.Struct):
    """What this node's engines fetched from one other node since the agent began.

    `seconds` are those from an engine's question to the answer, added up; `failed_blocks` are those that did not come, by why
    (`transport.node.messages.Loss`).
    """

    fetches: int = 0
    blocks: int = 0
    bytes: int = 0
    seconds: float = 0.0
    failed_blocks: dict[str, int] = {}

    def add(self, sizes: list[int], lost: Mapping[str, int], seconds: float) -> None:
        """Count a fetch that brought blocks of these sizes, in bytes, and `lost` others."""
        self.fetches += 1
        self.blocks += len(sizes)
        self.bytes += sum(sizes)
        self.seconds += seconds
        self.failed_blocks = dict(Counter(self.failed_blocks) + Counter(lost))


def write_fetches(run_dir: Path, counts: Mapping[str, FetchCounts]) -> None:
    """Replace run_dir's fetches.json atomically. Raises OSError."""
    fresh = run_dir / f"{FETCHES_FILE}.new"
    fresh.write_bytes(msgspec.json.encode(counts))
    fresh.replace(run_dir / FETCHES_FILE)


def read_fetches(run_dir: Path) -> dict[str, FetchCounts]:
    """Return what fetches.json says by node; nothing if there is none, or if it is another release's."""
    try:
        return msgspec.json.decode((run_dir / FETCHES_FILE).read_bytes(), type=dict[str, FetchCounts])
    except (OSError, msgspec.MsgspecError):
        return {}
