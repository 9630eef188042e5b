"""Puts the planner's plans into the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable

from gateway.ledger import Entry, Planned
from gateway.origins import Origin
from gateway.parity import Parity, ParityVerdict
from gateway.plan import Plan
from gateway.planner import Planner
from gateway.recorder import Recorder
from gateway.tables import Table
from gateway.witness import Asked

_EXACT = Parity.EXACT


class PlanWitness:
    """The relay's witness of `planner`'s plans. `wall_clock` gives Unix time in seconds."""

    def __init__(self, recorder: Recorder, planner: Planner, wall_clock: Callable[[], float] = time.time) -> None:
        self._recorder = recorder
        self._planner = planner
        self._wall_clock = wall_clock

    def sent(self, plan: Plan, asked: Asked) -> Entry:
        """The request is about to be sent to the plan's replica."""
        table = self._planner.registry.ledger.table(plan.replica.name)
        planned = planned_of(plan, asked, table, self._planner.parity, self._wall_clock())
        return self._recorder.sent(planned, Origin(asked.tenant, plan.asked.known.ids, plan.asked.lora))

    def first_byte(self, entry: Entry) -> bytes:
        """The replica's answer begins; returns the value of x-peerkv-cache, empty if not known."""
        return self._recorder.first_byte(entry)

    def ended(self, entry: Entry, status: int) -> None:
        """The attempt is over."""
        self._recorder.ended(entry, status)


def planned_of(plan: Plan, asked: Asked, table: Table | None, parity: ParityVerdict, at: float) -> Planned:
    """A plan as the ledger keeps it; `table` is the replica's, `parity` the verdict of that moment, `at` Unix time."""
    known, decision = plan.asked.known, plan.decision
    expected = decision.expected
    verdict = parity.chat if asked.endpoint == "chat" else parity.completions
    return Planned(  # by place: a call with more than 15 names takes five times as long
        asked.request_id,
        plan.tag,
        at,
        asked.endpoint,
        asked.tenant,
        asked.model,
        plan.replica.name,
        decision.source or "",
        decision.action,
        plan.reason,
        plan.prompt_tokens,
        table.block_size if table else 1,
        expected.local_tokens,
        expected.peer_tokens,
        decision.best_available_tokens,
        plan.held_tokens_max,
        expected.queue_seconds,
        expected.transfer_seconds,
        expected.prefill_seconds,
        known.ids is not None,
        known.certain or verdict.parity is _EXACT,
        known.cacheable,
        table is not None,
        decision.options,
    )
