"""Which blocks go into host memory: those that vLLM reallocates, those that another node is to read there, and the next in its
queue, so that they are there by then."""

from collections.abc import Iterable
from collections.abc import Sequence as Blocks
from typing import Any

from engine.connector.ahead import Ahead, Pace
from engine.connector.import_sources import Peers
from engine.connector.offers import Offers
from engine.connector.sequence import Import
from engine.tiers.host_memory import HostMemory
from engine.tiers.stores import Stores
from transport.hint import PinWish
from transport.keys import Keys
from transport.table.kept_table import KeptTable
from transport.table.writer import TableWriter


class Stored:
    """The tier of the engine that owns `table`, whose workers are `ranks`; its blocks are offered in `tier`."""

    def __init__(
        self,
        table: TableWriter,
        tier: KeptTable,
        sources: Peers,
        *,
        ranks: int,
        tenant_share_max: float,
        pin_share_max: float,
        ttl_seconds: float,
    ) -> None:
        self._table = table
        self._memory = HostMemory(
            tier,
            ranks=ranks,
            elsewhere=sources.stored_elsewhere,
            tenant_share_max=tenant_share_max,
            pin_share_max=pin_share_max,
            ttl_seconds=ttl_seconds,
        )
        self._ahead = Ahead(tier.layout.blocks)
        self._wanted: dict[int, None] = {}
        self.offers: Offers | None = None
        """Set once, as the two know each other."""

    @property
    def name(self) -> str:
        """The name under which its blocks are imported."""
        return self._memory.name

    def leaving(self, blocks: Blocks[int], by_import: bool) -> None:
        """vLLM reallocated `blocks`, in the step that is being made: what is on offer of them is stored before that."""
        self._take(blocks)
        self._memory.overwritten(blocks, by_import=by_import)
        self._ahead.moved(blocks)

    def lost(self, blocks: Blocks[int]) -> None:
        """Something that waits for nothing overwrites `blocks` with the step that is being made."""
        self._memory.lost(blocks)

    def wanted(self, blocks: Blocks[int]) -> None:
        """Another node is to read `blocks` out of host memory: what is on offer of them is stored with the next step."""
        self._wanted.update((block, None) for block in blocks if block < self._table.layout.blocks)

    def close_step(self, pool: Any, output: Any, pace: Pace) -> Stores:
        """Return what the workers have to store in the step that `output` is, with what `pool` will reallocate next."""
        # the GPU's runner (vLLM 0.33, v1/worker/gpu/model_runner.py, update_requests) does both before it tells a connector
        self._memory.lost(output.new_block_ids_to_zero or ())
        self._memory.lost(copy.dst_block_id for copy in output.kv_cache_block_copies or ())
        wanted, self._wanted = list(self._wanted), {}
        if wanted:
            self._take(wanted, len(wanted))
        if pool is not None:
            blocks, most = self._ahead.candidates(pool, pace)
            if blocks:
                self._ahead.chosen(*self._take(blocks, most))
        return self._memory.take_stores(at_once=bool(wanted) or pace is Pace.IDLE)

    def asked(self, keys: Keys) -> None:
        """A request has the blocks of these keys, computed or found: that is how popular each is."""
        self._memory.asked(keys)

    def copied(self, slots: dict[int, int], lost: Iterable[int]) -> None:
        """So many workers are done with these slots, and could not fill those that are `lost`."""
        if slots:
            self._memory.copied(slots, lost)

    def restored(self, slots: Blocks[int]) -> None:
        """These slots are being read, until `read` is told of them."""
        self._memory.restored(slots)

    def read(self, ended: Iterable[Import]) -> None:
        """These imports ended, from here or from elsewhere."""
        for each in ended:
            if each.source == self.name:
                self._memory.read(each.source_blocks.tolist())

    def pin(self, wish: PinWish, blocks: Blocks[int], now_ns: int) -> None:
        """Store the blocks of a prefix, which are pinned in vLLM's pool, and keep them here until the pin ends."""
        offered, keys = self._table.offered(blocks)
        if offered and self.offers is not None:
            self._memory.pin(wish, offered, keys, self.offers.groups(offered), self._table.quality(offered), now_ns)

    def unpin(self, ids: Blocks[int], now_ns: int) -> None:
        """End pins by number, and those whose time is up, as that of blocks may be; called in every step too."""
        self._memory.unpin(ids)
        self._memory.expire(now_ns)

    def clear(self) -> None:
        """Give up all that is stored."""
        self._memory.clear()
        self._ahead.clear()

    def _take(self, blocks: Blocks[int], most: int | None = None) -> tuple[list[int], bool]:
        """Store blocks that are on offer, the first `most` of them ahead of time; return which, and whether there are more."""
        offered, keys = self._table.offered(blocks)
        held = offered[:most]
        if held and self.offers is not None:
            groups, quality = self.offers.groups(held), self._table.quality(held)
            self._memory.take(held, keys[:most], groups, quality, ahead=most is not None)
        return held, len(held) < len(offered)
