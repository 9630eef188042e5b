"""Puts the most requested prefixes of a replica that is about to be emptied into the caches of others."""

from __future__ import annotations

import asyncio
import logging

from gateway.errors import ApiError
from gateway.kept_prefixes.prewarm import Prewarmer, body_for
from gateway.ledger.attempts import RequestInfo
from gateway.planner.plan import PlanningRequest
from gateway.planner.planner import Planner
from gateway.prompts.prompt_reader import KnownPrompt

_logger = logging.getLogger(__name__)

PREFIXES_MAX = 32
PREFIXES_LOOKED_AT = 256


class HandOver:
    """Belongs to the event loop's thread.

    A prefix is known by its keys alone, so only those are handed over that one of the last prompts begins with, and not
    those of LoRA adapters, whose name is not known then.
    """

    def __init__(self, planner: Planner, prewarmer: Prewarmer) -> None:
        self._planner = planner
        self._prewarmer = prewarmer

    async def run(self, replica: str) -> int:
        """Have others import, or compute, what `replica` alone holds of them; returns their tokens. The longest come first
        among those that were asked for as often, so that what is within them comes with them."""
        tokens = 0
        done = 0
        for key, depth_tokens, _, _ in self._planner.prefixes.top(PREFIXES_LOOKED_AT):
            if done == PREFIXES_MAX:
                break
            await asyncio.sleep(0)  # each look-up may be of a long prompt, and requests go on meanwhile
            prefix = self._only_there(replica, key, depth_tokens)
            if prefix is None:
                continue
            done += 1
            tokens += await self._put_elsewhere(prefix)
        return tokens

    def _only_there(self, replica: str, key: bytes, tokens: int) -> PlanningRequest | None:
        """The prefix as a request, if `replica` holds all of it and no other ready one does; else None."""
        state = self._planner.fleet.now()
        table = state.tables.get(replica)
        if table is None:
            return None
        blocks = tokens // table.block_size
        found = self._planner.recent.beginning_with(key, blocks)
        if found is None or found.known.ids is None or found.lora or not blocks:
            return None
        ids = found.known.ids[: tokens + 1]  # the last token of a prompt is never looked up
        held = self._planner.registry.look_up(state, ids, found.salt).blocks
        others = max((held.get(name, 0) for name in state.ready if name != replica), default=0)
        if held.get(replica, 0) < blocks or others >= blocks:
            return None
        known = KnownPrompt(ids, ids, certain=True, tokens=len(ids))
        return PlanningRequest(known=known, salt=found.salt)

    async def _put_elsewhere(self, prefix: PlanningRequest) -> int:
        """Return the tokens that another replica has now; 0 if that failed, which costs a computation later."""
        known = prefix.known
        assert known.ids is not None
        try:
            plan = self._planner.decide(prefix)
            body = body_for(known.ids)
            if plan.kv_transfer_params is not None:
                body["kv_transfer_params"] = plan.kv_transfer_params
            await self._prewarmer.send(plan, body, RequestInfo("hand-over", "completions", "", ""))
        except ApiError as error:
            _logger.warning("a prefix of %d tokens was not handed over: %s", known.tokens, error.message)
            return 0
        return known.tokens - 1
