"""What one fleet has to show: the bodies of /kv/stats, /kv/prefixes and /kv/explain."""

import time
from collections.abc import Callable, Mapping, Sequence

from engine.fleet import FleetSnapshot, FleetView
from gateway.block_registry.fleet_state import STATUS_OK
from gateway.block_registry.registry import holders, key_array
from gateway.block_registry.tables import Table
from gateway.kept_prefixes.book import KeptPrefixAnswer
from gateway.kept_prefixes.keeper import Keeper
from gateway.kept_prefixes.shapes import Prefix, PrefixReport
from gateway.ledger.recorder import Recorder
from gateway.limits.shapes import QueueStats
from gateway.planner.planner import Planner
from gateway.planner.prefix_counts import PrefixCounts
from gateway.prompts.tokenizer.service import TokenService
from gateway.stats.explain import Explanation, explain, request_id_of
from gateway.stats.process_figures import ProcessStats
from gateway.stats.shapes import KvStats
from gateway.stats.snapshot import StatsView
from gateway.steering.outliers import Ejection


class FleetFigures:
    """Assembles them on request. Belongs to the event loop's thread, as the tables do."""

    def __init__(
        self,
        *,
        fleet: FleetView,
        planner: Planner,
        tokens: TokenService,
        recorder: Recorder,
        keeper: Keeper,
        queue: Callable[[], QueueStats] = QueueStats,
    ) -> None:
        self._fleet = fleet
        self._planner = planner
        self._recorder = recorder
        self._keeper = keeper
        self._view = StatsView(fleet, planner, tokens, recorder, queue=queue)

    @property
    def model(self) -> str:
        """The name of its model."""
        snapshot = self._fleet.snapshot()
        return snapshot.served_model_name or snapshot.model

    def has(self, replica: str) -> bool:
        """Whether it is a replica of this fleet."""
        return self._fleet.snapshot().find(replica) is not None

    def stats(self, process: ProcessStats) -> KvStats:
        """Return the body of GET /kv/stats, with the figures of the gateway itself."""
        return self._view.snapshot(process)

    def prefixes(self, limit: int) -> PrefixReport:
        """The body of GET /kv/prefixes: the `limit` most requested ones, and all that are kept."""
        return prefix_report(self._planner.prefixes, limit, self._holders, self._keeper.all())

    def explain(self, request_id: str) -> Explanation | None:
        """The body of GET /kv/explain/{request_id}; None if nothing is kept under that id."""
        self._recorder.catch_up()
        for name in dict.fromkeys((request_id, request_id_of(request_id))):
            if entries := self._recorder.ledger.attempts(name):
                return explain(name, entries, self._planner.fleet.now().tables)
        return None

    def ejection(self, replica: str) -> Ejection:
        """Whether a replica gets requests, and why not."""
        return self._planner.outliers.seen(replica, time.monotonic())

    def warnings(self) -> list[str]:
        """What keeps replicas that are ready from exchanging KV, and disk or vault from being used, and what to do."""
        found = exchange_warnings(self._fleet.snapshot(), self._planner.fleet.now().tables)
        return [*found, *self._planner.promotions.tiers.warnings()]

    def _holders(self, keys: Sequence[bytes]) -> list[list[str]]:
        return holders(self._planner.fleet.now().tables, key_array(keys))


def exchange_warnings(snapshot: FleetSnapshot, tables: Mapping[str, Table]) -> list[str]:
    """Say of each replica that is ready beside others, and shares no KV, why, and what to do."""
    ready = snapshot.ready()
    found = []
    for replica in ready if len(ready) > 1 else ():
        table = tables.get(replica.name)
        if table is None:
            why = f"it has no block table in {snapshot.table_dir}"
        elif table.status != STATUS_OK:
            why = table.status
        else:
            continue
        found.append(f"{replica.name} shares no KV: {why}. Read {replica.log}; `peerkv doctor` says how much room there is.")
    return found


def prefix_report(
    counts: PrefixCounts,
    limit: int,
    holders: Callable[[Sequence[bytes]], Sequence[Sequence[str]]],
    kept: Sequence[KeptPrefixAnswer],
) -> PrefixReport:
    """Return the body of GET /kv/prefixes; `holders` tells for each key which replicas hold that block."""
    top = counts.top(limit)
    held = holders([key for key, *_ in top]) if top else []
    prefixes = [
        Prefix(key=key.hex(), tokens=tokens, requests=requests, last_used=last_used, holders=list(names))
        for (key, tokens, requests, last_used), names in zip(top, held, strict=True)
    ]
    return PrefixReport(tracked_blocks=len(counts), tracked_blocks_max=counts.blocks_max, prefixes=prefixes, kept=list(kept))
