"""The ways to fetch blocks from one other node, TCP and NIXL, and the choice between them: by what both nodes can do, measured.

Whatever becomes of NIXL, TCP is there: a fetch that NIXL cannot do goes by TCP at once, as long as nothing is being written.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from engine.joined_fleet import WayTold
from transport.node.block_client import BlockClient
from transport.node.block_fetcher import BlockFetcher, Fetched, NotOffered, StillWritten
from transport.node.messages import PROBE, PROBE_BLOCK_BYTES, BlocksAsked, NodeError
from transport.node.nixl.ability import Ability, Choice
from transport.node.nixl.client import NixlClient
from transport.node.staging import Piece

_logger = logging.getLogger(__name__)

PROBES = 3
"""Measurements of each way, of which the best counts, beside a first one that opens connections."""
PROBE_SECONDS = 0.5
"""No more is measured of a way that has taken so long, and no more blocks than it has time for."""


class Ways:
    """A BlockFetcher for `node`. `nixl` is None if this node has none, for the reason in `found`; `changed` is called from any
    thread. `tcp_bytes_per_second` is what was measured when it was heard before, 0 if nothing was."""

    def __init__(
        self,
        node: str,
        tcp: BlockClient,
        nixl: NixlClient | None,
        found: Ability,
        choice: Choice,
        changed: Callable[[], None],
        tcp_bytes_per_second: float = 0.0,
    ) -> None:
        self._node = node
        self.tcp = tcp
        self._nixl = nixl
        self._choice = choice
        self._changed = changed
        self._lock = threading.Lock()
        self._by_nixl = False
        self.settled = nixl is None and tcp_bytes_per_second > 0
        """Whether there is nothing more to measure."""
        reason = f"here: {found.reason}" if nixl is None else "not measured yet"
        self.told = WayTold(reason=reason, tcp_bytes_per_second=tcp_bytes_per_second)

    def fetch(self, asked: BlocksAsked, sizes: Sequence[int], target: Piece) -> Fetched:
        """As BlockFetcher has it, by the way that was chosen."""
        nixl = self._nixl
        if nixl is not None and self._by_nixl:
            try:
                return nixl.fetch(asked, sizes, target)
            except NotOffered as error:
                _logger.info("%s of %s comes by TCP: %s", asked.name, self._node, error)
            except NodeError as error:
                self._give_up(str(error))
                if isinstance(error, StillWritten):
                    raise
        return self.tcp.fetch(asked, sizes, target)

    def choose(self, target: Piece) -> None:
        """Measure the ways that there are, and choose. Blocks for some seconds at most."""
        measured = {"tcp": self.told.tcp_bytes_per_second}
        try:
            welcome = self.tcp.greet()
            if self._nixl is None or welcome.nixl or not measured["tcp"]:
                measured["tcp"] = rate(self.tcp, target)  # once, where a node is asked again and again for NIXL alone
            if self._nixl is None:
                self.settled = True
                self._say("tcp", self.told.reason, measured)
                return
            if not welcome.nixl:
                raise NodeError(f"{self._node}: {welcome.without_nixl}")
            measured["nixl"] = rate(self._nixl, target)
        except NodeError as error:
            if self._nixl is None:
                _logger.info("how fast blocks of %s come is not measured: %s", self._node, error)
            else:
                self.settled = False
                self._say("tcp", str(error), measured)
            return
        sooner = measured["nixl"] > measured["tcp"]
        self.settled = True  # before NIXL is used: a fetch by which it fails has it measured again
        if self._choice == "nixl":
            self._say("nixl", "node_transport is nixl", measured)
        else:
            self._say("nixl" if sooner else "tcp", "it is sooner", measured)

    def close(self) -> None:
        """As BlockFetcher has it."""
        self.settled = True
        self.tcp.close()
        if self._nixl is not None:
            self._nixl.close()

    def _give_up(self, reason: str) -> None:
        with self._lock:
            if not self._by_nixl:
                return
        self.settled = False
        self._say("tcp", f"NIXL failed: {reason}", {"tcp": self.told.tcp_bytes_per_second})

    def _say(self, transport: str, reason: str, measured: dict[str, float]) -> None:
        told = WayTold(transport, reason, measured.get("tcp", 0.0), measured.get("nixl", 0.0))
        with self._lock:
            self._by_nixl = transport == "nixl"
            known, self.told = self.told, told
        if (known.transport, known.reason) != (transport, reason):
            _logger.info("blocks of %s come by %s: %s", self._node, transport, reason)
        if known != told:
            self._changed()


def rate(way: BlockFetcher, target: Piece) -> float:
    """Return how many bytes a second come by a way, into a piece with slots of PROBE_BLOCK_BYTES. Raises NodeError.

    However fast it is, it is asked for no more than PROBES times the slots and one block more.
    """
    begun = time.monotonic()
    best, blocks = 0.0, 1
    for _ in range(1 + PROBES):
        asked = BlocksAsked(PROBE, 0, 0, np.arange(blocks, dtype="<u4").tobytes(), bytes(8 * blocks))
        before = time.monotonic()
        if not way.fetch(asked, [PROBE_BLOCK_BYTES] * blocks, target).good.all():
            raise NodeError("the blocks for measuring did not come")
        now = time.monotonic()
        best = max(best, blocks * PROBE_BLOCK_BYTES / (now - before))
        left = PROBE_SECONDS - (now - begun)
        if left <= 0:
            break
        blocks = max(1, min(len(target.rows), int(best * left / PROBE_BLOCK_BYTES)))
    return best
