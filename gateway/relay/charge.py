"""One request's account with its key's limits: let in, reserved for, and settled with what its answer used."""

from __future__ import annotations

from functools import partial
from typing import Any

from gateway.api.endpoints import Endpoint
from gateway.errors import DeadlinePassed, InvalidRequest
from gateway.http_server.transaction import Transaction
from gateway.ledger.attempts import Attempt
from gateway.limits.limiter import Limiter
from gateway.limits.prices import Usage
from gateway.limits.refusals import NoSuchModel
from gateway.limits.request_size import PromptSize, RequestSize, size_of
from gateway.relay.request_record import RequestRecord
from gateway.tenants.keys import Key

_NOTHING = RequestSize(0, 0, {})


class Charge:
    """To be made when the request has come, and settled once it has ended, however it ends: see `settle`.

    The `record` says what became of it. `hides_usage`: the client of a stream did not ask for the usage that we need.
    """

    def __init__(self, limiter: Limiter, key: Key, transaction: Transaction, record: RequestRecord) -> None:
        """Raises ApiError when the request may not be let in."""
        self.hides_usage = False
        self._limiter = limiter
        self._key = key
        self._transaction = transaction
        self._record = record
        self._size = _NOTHING
        self._event_tokens = 1
        self._assumed: int | None = None
        transaction.more_lines = partial(limiter.header_lines, key)
        self._reservation = limiter.begin(key)
        transaction.on_end = self.settle

    def check_model(self, name: str) -> None:
        """Raises NoSuchModel if the key may not use it."""
        if self._key.models and name not in self._key.models:
            self._limiter.count_refusal(self._key, "model")
            raise NoSuchModel(name)

    def reserve(
        self,
        endpoint: Endpoint,
        body: dict[str, Any],
        prompt: PromptSize,
        *,
        context_tokens: int | None,
        answer_tokens_default: int,
    ) -> dict[str, Any]:
        """Hold what the request may come to; returns the fields to put into its body for that. Raises ApiError."""
        try:
            _check_types(body)
            self._size = size_of(
                *(endpoint, body, self._key, prompt),
                context_tokens=context_tokens,
                answer_tokens_default=answer_tokens_default,
            )
        except InvalidRequest:
            self._limiter.count_refusal(self._key, "size")
            raise
        size, changes = self._size, self._size.changes
        self._assumed = next(iter(changes.values())) if changes else None
        self._limiter.hold(self._reservation, Usage(size.prompt_tokens, 0, size.answer_tokens), self._assumed)
        if body.get("stream") is True and endpoint in ("completions", "chat"):  # the others always tell
            options, interval = body.get("stream_options"), body.get("stream_interval")
            self.hides_usage = not (isinstance(options, dict) and options.get("include_usage") is True)
            if self.hides_usage:
                changes["stream_options"] = {"include_usage": True}
            self._event_tokens = interval or 1
        return changes

    @property
    def has_to_agree(self) -> bool:
        """Whether several gateways share limits."""
        return self._limiter.shared is not None

    async def agree(self) -> None:
        """Where several gateways share limits, have the others' requests counted too. Raises ApiError."""
        await self._limiter.agree(self._reservation, self._assumed)

    def settle(self) -> None:
        """The request has ended, or its whole answer is about to be sent. Only the first call counts."""
        self._transaction.on_end = None
        self._limiter.settle(self._reservation, self._usage())

    def _usage(self) -> Usage:
        """What the request used: nothing if an error is all that its client gets, unless that is its own deadline's."""
        record, transaction = self._record, self._transaction
        late = isinstance(transaction.ending, DeadlinePassed)  # its client gave it up, as one that leaves does
        record.read_counts()
        attempt, told = record.prompt_attempt or record.attempt, record.usage
        if attempt is None or not (told is not None or transaction.left or late or transaction.begun_well):
            return Usage()
        if told is not None:
            uncached = _computed(attempt, told.prompt_tokens)
            cached = told.cached_tokens if uncached is None else told.prompt_tokens - uncached
            return Usage(told.prompt_tokens - cached, cached, told.completion_tokens)
        # It broke off: what was sent of it, and its prompt, which was computed if anything was.
        prompt_tokens, answer_tokens = self._size.prompt_tokens, self._size.answer_tokens
        uncached = _computed(attempt, prompt_tokens)
        uncached = prompt_tokens if uncached is None else uncached
        generated = answer_tokens  # of a large answer that is passed on as it comes the usage is not seen
        if record.streamed or late or (transaction.left and not transaction.begun):
            generated = min(record.events * self._event_tokens, answer_tokens)
        return Usage(uncached, prompt_tokens - uncached, generated)


def _check_types(body: dict[str, Any]) -> None:
    """vLLM takes 1 and "true" for true, and "5" for 5; what is charged depends on these. Raises InvalidRequest."""
    stream = body.get("stream")
    if stream is not None and type(stream) is not bool:
        raise InvalidRequest("'stream' must be true or false.", param="stream", code="invalid_type")
    interval = body.get("stream_interval")
    if interval is not None and (type(interval) is not int or interval < 1):
        raise InvalidRequest("'stream_interval' must be a whole number above 0.", param="stream_interval", code="invalid_type")


def _computed(attempt: Attempt, prompt_tokens: int) -> int | None:
    """Of a prompt's tokens those that the engine computed, as its records in the ledger say; None without one."""
    computed = None
    for delivery in attempt.deliveries:
        if delivery.scheduled_ns:
            computed = (computed or 0) + delivery.computed_tokens
    return None if computed is None else min(prompt_tokens, computed)
