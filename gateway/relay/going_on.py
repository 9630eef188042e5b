"""Going on with a stream whose replica died: what is kept for that while it runs, and what is asked of another replica then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Generic, NamedTuple

from gateway.api.endpoints import Endpoint
from gateway.continuation.rest import RestOfStream
from gateway.continuation.resumed import Resumed
from gateway.continuation.tape import Tape
from gateway.continuation.terms import Terms, TokensDefault, terms_of
from gateway.errors import NoReplicaReady
from gateway.ledger.attempts import Attempt
from gateway.relay.interfaces import Plan, PlannerLike, PlanT


class Rest(NamedTuple, Generic[PlanT]):
    """How a stream goes on: the plan, what is put into its body, and what makes its events the rest of the stream."""

    plan: PlanT
    changes: Mapping[str, Any]
    resumed: RestOfStream


class GoingOn(Generic[PlanT]):
    """`is_whole` tells whether text ends with the last of some ids, rather than within a character. `parses`: the engines parse
    the text of chats. `tokens_default` tells the bound of answers that name none.
    """

    def __init__(
        self,
        planner: PlannerLike[PlanT],
        *,
        is_whole: Callable[[Sequence[int]], bool] = lambda ids: False,
        parses: bool = False,
        tokens_default: TokensDefault = lambda: None,
    ) -> None:
        self._planner = planner
        self._is_whole = is_whole
        self._parses = parses
        self._tokens_default = tokens_default

    def tape(self, endpoint: Endpoint, body: Mapping[str, Any], bounds: Mapping[str, Any] | None, plan: PlanT) -> Tape | None:
        """What the stream of a request with this body is put on; None if it could not be continued."""
        terms = terms_of(endpoint, body, bounds or {}, self._tokens_default, parses=self._parses)
        return None if terms is None else Tape(terms, keeps_prompt=not self._planner.knows_prompt(plan))

    def rest(self, tape: Tape, plan: PlanT, attempt: Attempt, exclude: Set[str]) -> Rest[PlanT] | None:
        """How a stream goes on of which the tape has what was sent; None if it cannot. The plan's replica is in `exclude`."""
        try:
            if tape.terms.parsed:
                replayed = tape.replayed(cached_tokens(attempt))
                return None if replayed is None else Rest(self._planner.replan(plan, exclude=exclude), {}, replayed)
            return self._behind(tape, plan, attempt, exclude)
        except NoReplicaReady:
            return None

    def _behind(self, tape: Tape, plan: PlanT, attempt: Attempt, exclude: Set[str]) -> Rest[PlanT] | None:
        """As `rest`, behind as many tokens as can be. Raises NoReplicaReady."""
        cut = tape.cut(self._is_whole)
        if cut is None:
            return None
        found = None
        if len(cut.kept):
            prompt = _ids(tape.prompt)
            found = self._planner.go_on(plan, cut.kept, chat=tape.terms.chat, prompt=prompt, exclude=exclude)
        if found is None:
            cut = tape.cut(self._is_whole, from_start=True)
            assert cut is not None  # as it was not before
            found = self._planner.replan(plan, exclude=exclude)
        resumed = Resumed(cut, tape.terms, _prompt_tokens(tape, plan), cached_tokens(attempt))
        return Rest(found, _changes(tape.terms, found.prompt, len(cut.kept)), resumed)

    def ending(self, tape: Tape, plan: PlanT, attempt: Attempt) -> bytes:
        """What is still due of a stream whose last token was sent."""
        return tape.ending(_prompt_tokens(tape, plan), cached_tokens(attempt) or 0)


def _prompt_tokens(tape: Tape, plan: Plan) -> int:
    return tape.prompt.count(b",") + 1 if tape.prompt else plan.prompt_tokens


def cached_tokens(attempt: Attempt) -> int | None:
    """How many tokens of the prompt came out of a cache, None if that is not known."""
    steered = attempt.steered
    return steered.local_tokens + steered.peer_tokens if steered is not None and steered.scheduled_ns else None


def _changes(terms: Terms, prompt: Sequence[Any] | None, kept: int) -> dict[str, Any]:
    """What is put into the body of a request that goes on behind so many tokens."""
    if not kept:
        return {}
    changes: dict[str, Any] = {}
    if not terms.chat:
        changes["prompt"] = prompt
    if terms.max_tokens is not None:
        changes["max_completion_tokens" if terms.chat else "max_tokens"] = terms.max_tokens - kept
    if terms.min_tokens:
        changes["min_tokens"] = max(0, terms.min_tokens - kept)
    return changes


def _ids(decimals: bytes) -> list[int] | None:
    return [int(each) for each in decimals.split(b",")] if decimals else None
