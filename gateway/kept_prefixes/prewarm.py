"""Has a replica put a prompt into its cache, by a request for one token."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from engine.fleet import FleetView
from gateway.errors import InvalidRequest, Unavailable
from gateway.ledger.attempts import Attempt, RequestInfo
from gateway.ledger.ledger import LOST_STATUS
from gateway.ledger.recorder import Recorder
from gateway.planner.plan import Plan
from gateway.token_ids import TokenIds
from gateway.upstream.pool import Upstream, UpstreamLost

_logger = logging.getLogger(__name__)

_PATH = "/v1/completions"


def body_for(ids: TokenIds, model: str = "") -> dict[str, Any]:
    """What asks for one token after `ids`; `model` is an adapter's name, "" for none."""
    body: dict[str, Any] = {"prompt": ids.tolist(), "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    return body | {"model": model} if model else body


class Prewarmer:
    """Belongs to the event loop's thread; `seconds_max` bounds each request."""

    def __init__(self, fleet: FleetView, upstream: Upstream, recorder: Recorder, seconds_max: float) -> None:
        self._fleet = fleet
        self._upstream = upstream
        self._recorder = recorder
        self._seconds_max = seconds_max

    async def send(self, plan: Plan, body: dict[str, Any], info: RequestInfo) -> Attempt:
        """Send a planned request, without an await since; returns what became of it. Raises ApiError."""
        if plan.cache_salt is not None:
            body["cache_salt"] = plan.cache_salt
        attempt = self._recorder.begin(plan, info)
        status = LOST_STATUS
        try:
            status = await self._answered(plan, body)
            self._recorder.first_byte(attempt)
        finally:
            self._recorder.ended(attempt, status)
        return attempt

    async def _answered(self, plan: Plan, body: dict[str, Any]) -> int:
        """Return the status of the replica's answer, which is 200. Raises ApiError."""
        name = plan.replica.name
        try:
            status, answer = await self._upstream.post_json(plan.replica, _PATH, msgspec.json.encode(body), self._seconds_max)
        except UpstreamLost as error:
            self._fleet.suspect(name)
            raise Unavailable(f"{error}.") from error
        if status != 200:
            _logger.warning("%s answered %d to a prefix: %s", name, status, answer[:200])
            raise InvalidRequest(f"{name} refused it with status {status}.")
        return status
