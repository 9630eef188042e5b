"""The figures of all fleets, behind /kv/*, /ready and /metrics: of the model that is named, or of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gateway.kept_prefixes.shapes import PrefixReport
from gateway.stats.explain import Explanation
from gateway.stats.process_figures import ProcessFigures
from gateway.stats.prometheus import CONTENT_TYPE, Metrics
from gateway.stats.replica_metrics import ReplicaMetrics
from gateway.stats.shapes import KvStats
from gateway.stats.view import FleetFigures
from gateway.steering.outliers import Ejection


class AllFigures:
    """Belongs to the event loop's thread, as the tables do. `place` tells which fleet is a model's, and raises UnknownModel.

    `measured` takes what the front door measures for each request, and `measure` has it take what waits for that.
    """

    def __init__(
        self,
        fleets: Sequence[FleetFigures],
        place: Callable[[str], int],
        process: ProcessFigures,
        *,
        measured: Metrics,
        measure: Callable[[], None] = lambda: None,
        replica_metrics: ReplicaMetrics | None = None,
    ) -> None:
        self.measured = measured
        self._fleets = tuple(fleets)
        self._place = place
        self._process = process
        self._measure = measure
        self._replica_metrics = replica_metrics
        measured.attach(self._all_stats)

    def stats(self, model: str = "") -> KvStats:
        """Return the body of GET /kv/stats. Raises UnknownModel."""
        stats = self._of(model).stats(self._process.stats())
        stats.models = [each.model for each in self._fleets]
        return stats

    def prefixes(self, limit: int, model: str = "") -> PrefixReport:
        """The body of GET /kv/prefixes: the `limit` most requested ones, and all that are kept. Raises UnknownModel."""
        return self._of(model).prefixes(limit)

    def explain(self, request_id: str) -> Explanation | None:
        """The body of GET /kv/explain/{request_id}; None if nothing is kept under that id."""
        found = [part for each in self._fleets if (part := each.explain(request_id)) is not None]
        if len(found) < 2:
            return found[0] if found else None
        attempts = sorted((attempt for part in found for attempt in part.attempts), key=lambda attempt: attempt.time)
        return Explanation(request_id=found[0].request_id, attempts=attempts)  # an id of a client's, for requests to several

    async def metrics(self) -> tuple[bytes, str]:
        """Return the body of GET /metrics, with the replicas' own metrics if they are wanted, and its content type."""
        self._measure()
        of_replicas = await self._replica_metrics.render() if self._replica_metrics is not None else b""
        return self.measured.render() + of_replicas, CONTENT_TYPE

    def place(self, model: str) -> int:
        """Which of the fleets has a model. Raises UnknownModel."""
        return self._place(model)

    def ejection(self, replica: str) -> Ejection:
        """Whether a replica gets requests, and why not."""
        return next((each for each in self._fleets if each.has(replica)), self._fleets[0]).ejection(replica)

    def warnings(self) -> list[str]:
        """What keeps replicas that are ready from exchanging KV, and disk or vault from being used, and what to do."""
        found = (warning for each in self._fleets for warning in each.warnings())
        return [*dict.fromkeys(found), *self._process.warnings()]

    def _all_stats(self) -> list[KvStats]:
        process = self._process.stats()
        return [each.stats(process) for each in self._fleets]

    def _of(self, model: str) -> FleetFigures:
        return self._fleets[self._place(model)]
