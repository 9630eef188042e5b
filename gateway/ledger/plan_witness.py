"""Puts the planner's plans into the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable

from gateway.ledger.attempts import Asked, Entry, Planned
from gateway.ledger.recorder import Recorder
from gateway.planner.plan import Plan
from gateway.planner.planner import Planner
from gateway.prompts.parity import Parity

_EXACT = Parity.EXACT


class PlanWitness:
    """The relay's witness of `planner`'s plans. `wall_clock` gives Unix time in seconds."""

    def __init__(self, recorder: Recorder, planner: Planner, wall_clock: Callable[[], float] = time.time) -> None:
        self._recorder = recorder
        self._planner = planner
        self._table = planner.registry.ledger.table
        self._wall_clock = wall_clock
        self.first_byte = recorder.first_byte
        """The replica's answer begins; returns the value of x-peerkv-cache, empty if not known."""
        self.ended = recorder.ended
        """The attempt is over."""

    def sent(self, plan: Plan, asked: Asked) -> Entry:
        """The request is about to be sent to the plan's replica."""
        known, decision = plan.asked.known, plan.decision
        table = self._table(decision.replica)
        planned = Planned(
            asked,
            decision,
            plan.tag,
            self._wall_clock(),
            plan.prompt_tokens,
            table.block_size if table is not None else 1,
            plan.held_tokens_max,
            known.ids is not None,
            known.certain or self._exact(asked),
            known.cacheable,
            table is not None,
            known.why_unknown,
        )
        return self._recorder.sent(planned, known.ids, plan.asked.lora)

    def _exact(self, asked: Asked) -> bool:
        """Whether our token ids are the engine's, as far as is known at this moment."""
        parity = self._planner.prompts.parity
        return (parity.chat if asked.endpoint == "chat" else parity.completions).parity is _EXACT
