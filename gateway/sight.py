"""What there is to see of the replicas' caches: the bodies of /kv/stats, /kv/prefixes and /metrics."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from engine.fleet import FleetView
from gateway.explain import Explanation, explain
from gateway.keeper import Keeper
from gateway.metrics import CONTENT_TYPE, Metrics
from gateway.planner import Planner
from gateway.prefix_shapes import kept_answer
from gateway.prefixes import PrefixReport
from gateway.recorder import Recorder
from gateway.registry import key_array
from gateway.relay import Relay
from gateway.stats import KvStats, StatsView
from gateway.tokens import TokenService


class FleetSight:
    """Puts them together when asked. Belongs to the event loop's thread, as the tables do.

    `measured` takes what the front door measures of each request.
    """

    def __init__(
        self, *, fleet: FleetView, planner: Planner, tokens: TokenService, relay: Relay[Any], recorder: Recorder, keeper: Keeper
    ) -> None:
        self.measured = Metrics()
        recorder.feed.add(self.measured.imports.delivered)
        self._planner = planner
        self._relay = relay
        self._recorder = recorder
        self._keeper = keeper
        self._view = StatsView(fleet, planner, tokens, recorder, self._door)
        self.measured.attach(self.stats)

    def stats(self) -> KvStats:
        """The body of GET /kv/stats."""
        return self._view.snapshot()

    def prefixes(self, limit: int) -> PrefixReport:
        """The body of GET /kv/prefixes: the `limit` most requested ones, and all that are kept."""
        report = self._planner.prefixes.report(limit, self._holders)
        return report.model_copy(update={"kept": [kept_answer(kept) for kept in self._keeper.all()]})

    def explain(self, request_id: str) -> Explanation | None:
        """The body of GET /kv/explain/{request_id}; None if nothing is kept under that id."""
        self._recorder.catch_up()
        entries = self._recorder.ledger.attempts(request_id)
        return explain(request_id, entries) if entries else None

    def metrics(self) -> tuple[bytes, str]:
        """The body of GET /metrics and its content type."""
        return self.measured.render(), CONTENT_TYPE

    def _door(self) -> dict[str, int]:
        return {**asdict(self._relay.counters), "in_flight": self._relay.in_flight}

    def _holders(self, keys: Sequence[bytes]) -> list[list[str]]:
        return self._planner.registry.holders(key_array(keys))
