"""The hot path: a request of `/v1/*` goes to a replica, its answer back, byte for byte.

The server's own cycle towards the client, a connection of our own towards the replica, and no layer in between. As long as the
client has got nothing, a replica that dies is replaced by another one; after that an event stream ends with an error event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Generic

import msgspec

from engine.fleet import FleetView
from gateway.api.body import Endpoint, check_body, decode_body
from gateway.api.encodings import as_utf8
from gateway.api.engine_errors import error_code, error_in_our_form
from gateway.errors import (
    ApiError,
    InternalError,
    InvalidRequest,
    NoReplicaReady,
    NotOfThisModel,
    ReplicaLost,
    TooManyRequests,
    Unavailable,
)
from gateway.http_server.request_cycle import Scope
from gateway.http_server.transaction import JSON_LINE, ClientLeft, Transaction
from gateway.ledger.attempts import Attempt, RequestInfo
from gateway.ledger.ledger import LEFT_STATUS, LOST_STATUS
from gateway.limits.limiter import Limiter
from gateway.prompts.prompt_reader import KnownPrompt
from gateway.relay.admission import Admission, timeout_of
from gateway.relay.answer import Answer, at_hand, pass_on
from gateway.relay.batching import Batching
from gateway.relay.charge import Charge
from gateway.relay.counters import RelayCounters
from gateway.relay.engine_body import EngineBody, engine_body, spliced_body
from gateway.relay.interfaces import AttemptRecorder, PlannerLike, PlanT
from gateway.relay.keep_alive import KeepAlive
from gateway.relay.large_bodies.pool import LargeBodies
from gateway.relay.record_queue import RecordQueue
from gateway.relay.request_record import RequestRecord
from gateway.relay.uploads import Uploads
from gateway.settings import Settings
from gateway.tenants.access import AdminAccess, caller
from gateway.tenants.tenants import TenantContext, Tenants
from gateway.upstream.connection import ConnectionBroke
from gateway.upstream.pool import LocalShortage, Upstream, UpstreamLost, broken
from gateway.upstream.served_models import ModelsCache

_logger = logging.getLogger(__name__)

PATHS: dict[str, Endpoint] = {
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/v1/embeddings": "embeddings",
}
ENDING_SECONDS_MAX = 2.0  # in which requests that are ended tell their clients so
# The replica is in trouble and another one may not be; every other answer is the client's.
RETRIED_STATUSES = frozenset({429, 500, 502, 503})
_ENGINE_DIED = b"EngineCore encountered an issue"  # vLLM's words to the requests that its engine held when it ended


class RelayedRequest(msgspec.Struct, Generic[PlanT], eq=False):
    """A request on its way over one replica or more. `bounds` are fields that its key's limits put into its body."""

    transaction: Transaction
    record: RequestRecord
    path: str
    body: EngineBody
    plan: PlanT
    info: RequestInfo
    charge: Charge | None = None
    bounds: dict[str, Any] | None = None
    excluded: frozenset[str] = frozenset()
    replicas_ended: int = 0


class Relay(Generic[PlanT]):
    """Serves the endpoints in PATHS."""

    def __init__(
        self,
        settings: Settings,
        *,
        fleet: FleetView,
        upstream: Upstream,
        models: ModelsCache,
        planner: PlannerLike[PlanT],
        recorder: AttemptRecorder[PlanT],
        tenants: Tenants,
        access: AdminAccess,
        limiter: Limiter,
        large_bodies: LargeBodies | None = None,
    ) -> None:
        self.counters = RelayCounters()
        self.draining = False
        self.records = RecordQueue()
        self._settings = settings
        self._fleet = fleet
        self._upstream = upstream
        self._models = models
        self._planner = planner
        self._recorder = recorder
        self._tenants = tenants
        self._access = access
        self._limiter = limiter
        self._large_bodies = large_bodies
        self._transactions: set[Transaction] = set()
        self._batching = Batching()
        self._uploads = Uploads(settings.uploads_max)
        self._slots_taken = 0
        self._held_bytes = 0
        self.keep_alive = KeepAlive(settings.sse_keep_alive_seconds, self._transactions)
        self.admission: Admission | None = None
        if settings.replica_requests_max:
            self.admission = Admission(settings, lambda: len(fleet.snapshot().ready()))
        self._idle = asyncio.Event()  # set while draining, once all requests are done

    @property
    def in_flight(self) -> int:
        """Requests being served now."""
        return len(self._transactions)

    def __call__(self, endpoint: Endpoint, scope: Scope) -> Awaitable[None]:
        """Serve one POST request to `endpoint`; to be called and awaited by the task that does so."""
        transaction, record = Transaction(scope), RequestRecord(endpoint)
        return self.guard(record, transaction, self._serve(endpoint, transaction, record))

    async def guard(self, record: RequestRecord, transaction: Transaction, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`, turn whatever it raises into the right end of the transaction, and have the `record` measured."""
        self.counters.requests += 1
        exchanges = self._transactions
        try:
            if self.draining:
                raise Unavailable("The gateway is stopping.")
            exchanges.add(transaction)
            await work
        except ApiError as error:
            self.counters.refused += error.status < 500
            record.error = error.code or error.type
            transaction.fail(error)
        except ClientLeft:
            transaction.left = True
            self.counters.clients_left += 1
        except asyncio.CancelledError:
            await self._cancelled(transaction, record)
        except Exception:
            self.counters.internal_errors += 1
            _logger.exception("request %s failed", transaction.request_id)
            defect = InternalError(transaction.request_id)
            record.error = defect.code or defect.type
            transaction.fail(defect)
        finally:
            work.close()
            transaction.unwatch()
            if transaction.on_end is not None:
                transaction.on_end()
                transaction.on_end = None  # which may refer to the transaction
            if transaction.has_turn and self.admission is not None:
                self.admission.leave()
            self._held_bytes -= transaction.body_bytes
            self._slots_taken -= transaction.has_slot
            exchanges.discard(transaction)
            if self.draining and not exchanges:
                self._idle.set()
            _finish(record, transaction)
            self.records.add(record)

    async def _cancelled(self, transaction: Transaction, record: RequestRecord) -> None:
        """Our own cancellation ends here; any other is raised again."""
        task = asyncio.current_task()
        if task is None or not (transaction.left or transaction.ending):
            raise asyncio.CancelledError
        task.uncancel()
        if transaction.left:
            self.counters.clients_left += 1
        elif transaction.ending is not None:
            record.error = transaction.ending.code or transaction.ending.type
            transaction.fail(transaction.ending)

    async def drain(self, seconds: float) -> None:
        """Take nothing new; wait until all requests are done, then end those that are not after `seconds`.

        Those have ENDING_SECONDS_MAX to say so to their clients, so that nobody takes our end for a replica's.
        """
        self.draining = True
        if await self._idle_in(seconds):
            return
        _logger.warning("ending %d requests that did not finish in %g s", self.in_flight, seconds)
        for transaction in tuple(self._transactions):
            transaction.end(Unavailable("The gateway stopped before the answer was complete."))
        if not await self._idle_in(ENDING_SECONDS_MAX):
            _logger.warning("%d requests did not end", self.in_flight)

    async def _idle_in(self, seconds: float) -> bool:
        """Whether all requests are done within `seconds`."""
        if not self._transactions:
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return self._idle.is_set()

    async def _serve(self, endpoint: Endpoint, transaction: Transaction, record: RequestRecord) -> None:
        fields = transaction.fields
        tenant = caller(self._tenants, transaction.scope, fields.authorization, fields.host)
        record.tenant = tenant.name
        charge = None if tenant.key is None else Charge(self._limiter, tenant.key, transaction, record)
        if fields.wanted_replica is not None:
            self._access.check(transaction.scope)
        if not fields.is_json:
            raise InvalidRequest("Send the header 'Content-Type: application/json'.", code="invalid_content_type")
        settings = self._settings
        raw: bytes | bytearray | None = transaction.body_at_hand(self._hold, settings.body_bytes_max)
        if raw is None:
            raw = await self._upload(transaction, tenant)
        self.take_slot(transaction)
        transaction.watch()
        if fields.encoding is not None:
            raw = await transaction.decode_body(raw, self._hold, settings.body_bytes_max)
        if len(raw) > settings.body_inline_bytes_max and self._large_bodies is not None:
            body, known, sent = await _read_large(self._large_bodies, endpoint, raw, tenant)
        else:
            body, known, sent = _read_small(endpoint, raw)
        model = body.get("model") or ""
        if charge is not None:
            charge.check_model(model, await self._models.current())
        if model and not self._models.lists(model):
            await self._models.card(model)
        record.model = model or self._fleet.snapshot().served_model_name
        record.streamed = body.get("stream") is True
        read = await self._planner.read(endpoint, body, tenant, wanted_replica=fields.wanted_replica, known=known)
        bounds = None if charge is None else self._reserve(charge, endpoint, body, read)
        if self.admission is not None:
            if record.streamed and endpoint != "embeddings":
                self.keep_alive.waits(transaction)
            tokens = self._planner.uncached_tokens(read)
            await self.admission.enter(tenant.name, tenant.rank, tokens, timeout_of(fields.timeout))
            transaction.has_turn = True
        if len(self._transactions) > 1:
            await self._batching.wait()
        plan = self._planner.decide(read)
        if plan.held_bytes:
            self._hold(plan.held_bytes)
            transaction.body_bytes += plan.held_bytes
        info = RequestInfo(transaction.request_id, endpoint, tenant.name, model)
        request = RelayedRequest(transaction, record, transaction.scope["path"], sent(plan.prompt), plan, info, charge, bounds)
        if record.streamed and endpoint != "embeddings":
            self.keep_alive.waits(transaction)
        del raw, body, known, sent, read  # what was decoded is many times what is sent
        await self._travel(request)

    def _reserve(self, charge: Charge, endpoint: Endpoint, body: dict[str, Any], read: Any) -> dict[str, Any]:
        """Hold what the request may come to; returns the fields that keep it from coming to more. Raises ApiError."""
        models = self._models.known
        return charge.reserve(
            endpoint,
            body,
            self._planner.prompt_size(read),
            context_tokens=None if models is None else models.context_tokens,
            answer_tokens_default=self._settings.answer_tokens_default,
        )

    async def _upload(self, transaction: Transaction, tenant: TenantContext) -> bytes | bytearray:
        """Wait for the body, in the account of the tenant, or of the client's address where nobody needs a key."""
        client = transaction.scope.get("client")
        whose = client[0] if client and self._tenants.open else tenant.name

        def hold(size: int) -> None:
            self._hold(size, transaction)
            self._uploads.went_on(whose, transaction)

        self._uploads.begin(whose, transaction)
        try:
            return await transaction.read_body(hold, self._settings.body_bytes_max, self._settings.body_seconds_max)
        finally:
            self._uploads.end(whose, transaction)

    def take_slot(self, transaction: Transaction) -> None:
        """The request has arrived completely: it counts as being served until it ends. Raises TooManyRequests."""
        if self._slots_taken >= self._settings.requests_in_flight_max:
            raise TooManyRequests(self._settings.requests_in_flight_max)
        self._slots_taken += 1
        transaction.has_slot = True

    def _hold(self, size: int, asking: Transaction | None = None) -> None:
        """Count bytes that are about to be held, of the upload that is `asking` for it if it is one. Raises Unavailable."""
        excess = self._held_bytes + size - self._settings.bodies_bytes_max
        if excess > 0:
            self._held_bytes -= self._uploads.make_room(excess, time.perf_counter(), asking)
        if self._held_bytes + size > self._settings.bodies_bytes_max:
            raise Unavailable("The gateway holds as many request bytes as it may.")
        self._held_bytes += size

    async def _travel(self, request: RelayedRequest[PlanT]) -> None:
        """Try replicas until one has answered."""
        transaction = request.transaction
        for attempts_left in range(self._settings.retry_attempts_max, -1, -1):
            answer: Answer | None = None
            may_go_on, lost = True, LOST_STATUS
            attempt = request.record.attempt = self._recorder.begin(request.plan, request.info)
            request.record.attempts += 1
            try:
                if len(self._transactions) > 1:
                    await self._batching.wait()
                answer = await self._attempt(request, attempt)
                if transaction.begun:
                    return
                if _says_that_its_engine_died(answer):
                    may_go_on = self._may_go_on(request, attempt)
            except LocalShortage as error:
                lost = LEFT_STATUS  # it says nothing about the replica
                raise Unavailable(f"The gateway is out of resources: {error}.") from None
            except UpstreamLost as error:
                self.counters.replicas_lost += 1
                # As text: a handler that keeps what is logged shall not keep the request's frames, and its body.
                _logger.warning("request %s lost its replica: %s", transaction.request_id, str(error))
                self._fleet.suspect(request.plan.replica.name)
                if transaction.begun:
                    self.counters.streams_broken += 1
                    raise ReplicaLost from error
                may_go_on = not error.sent or self._may_go_on(request, attempt, given_up=error.given_up)
            finally:
                self._recorder.ended(attempt, _outcome(transaction, answer, lost))
            if answer is None or answer.status in RETRIED_STATUSES:
                try:
                    may_go_on = may_go_on and attempts_left > 0 and transaction.fields.wanted_replica is None
                    retried = may_go_on and self._replan(request)
                except NoReplicaReady:
                    retried = False
                if retried:
                    continue
            if answer is None or _says_that_its_engine_died(answer):
                raise ReplicaLost
            if answer.status == 404 and b'"error"' not in answer.body:  # not vLLM's handler: it has no such route
                raise NotOfThisModel(request.path)
            if answer.status >= 400:
                answer.lines, answer.body = JSON_LINE, error_in_our_form(answer.status, answer.body)
                request.record.error = error_code(answer.body)
            else:
                request.record.ends_with(answer.body)
            if request.charge is not None:
                request.charge.settle()  # so that the headers tell what is left after it
            transaction.answer(answer.status, answer.lines, answer.body)
            return

    def _may_go_on(self, request: RelayedRequest[PlanT], attempt: Attempt, *, given_up: bool = False) -> bool:
        """Whether another replica may get a request whose replica ended, or stood still, after it had got all of it.

        The request may be the cause. Unless its replica is known to have borne it, one other gets it, and not the last one.
        """
        if not given_up and self._recorder.was_borne(attempt):
            return True
        request.replicas_ended += 1
        left = {replica.name for replica in self._fleet.snapshot().ready()} - request.excluded - {request.plan.replica.name}
        return request.replicas_ended == 1 and (given_up or len(left) > 1)

    def _replan(self, request: RelayedRequest[PlanT]) -> bool:
        request.excluded |= {request.plan.replica.name}
        request.plan = self._planner.replan(request.plan, exclude=request.excluded)
        self.counters.retries += 1
        return True

    async def _attempt(self, request: RelayedRequest[PlanT], attempt: Attempt) -> Answer | None:
        """The replica's answer, or None when it was streamed to the client. Raises UpstreamLost."""
        transaction, plan = request.transaction, request.plan
        changes: dict[str, Any] = {}
        if plan.cache_salt is not None:
            changes["cache_salt"] = plan.cache_salt
        if plan.kv_transfer_params is not None:
            changes["kv_transfer_params"] = plan.kv_transfer_params
        if request.bounds:
            changes |= request.bounds
        parts = request.body.parts(changes)
        lines = b"%bx-request-id: %b\r\n%b" % (JSON_LINE, transaction.request_id.encode(), transaction.fields.passed_lines)
        if len(self._transactions) > 1:
            await self._batching.wait()
        movable = transaction if transaction.fields.wanted_replica is None else None
        response = await self._upstream.post(plan.replica, request.path, lines, parts, movable)
        transaction.replica = plan.replica.name.encode()
        try:
            answer = at_hand(response)
            if answer is None:
                transaction.answering = lambda: self._recorder.stream_begins(attempt)
                answer = await pass_on(
                    *(transaction, response, request.record),
                    bytes_max=self._settings.answer_bytes_max,
                    hides_usage=request.charge is not None and request.charge.hides_usage,
                )
            if answer is not None and (cache := self._recorder.first_byte(attempt)):
                answer.lines += b"x-peerkv-cache: %b\r\n" % cache
            return answer
        except ConnectionBroke as error:
            raise broken(plan.replica, error, response) from error
        finally:
            transaction.answering = None
            self._upstream.release(plan.replica, response)


Looked = tuple[dict[str, Any], KnownPrompt | None, Callable[[Sequence[Any] | None], EngineBody]]
"""The fields that planning looks at, the prompt if it was read too, and what makes a replica's body with another prompt."""


def _read_small(endpoint: Endpoint, raw: bytes | bytearray) -> Looked:
    raw = as_utf8(raw)
    body = decode_body(raw)
    untouched = raw if check_body(endpoint, body) else None
    return body, None, lambda prompt: engine_body(body, untouched, prompt)


async def _read_large(bodies: LargeBodies, endpoint: Endpoint, raw: bytes | bytearray, tenant: TenantContext) -> Looked:
    body, known, span = await bodies.read(endpoint, raw, tenant.salt)
    return body, known, lambda prompt: spliced_body(raw, span, prompt)


def _says_that_its_engine_died(answer: Answer | None) -> bool:
    """In the body of any other answer the words may be a prompt's, or a model's."""
    return answer is not None and answer.status == 500 and _ENGINE_DIED in answer.body


def _finish(record: RequestRecord, transaction: Transaction) -> None:
    """The request is over."""
    came_at, status = transaction.came_at, transaction.status
    record.request_id = transaction.request_id
    record.status = LEFT_STATUS if transaction.left else status
    record.first_byte_seconds = transaction.begun_at - came_at if status else None
    record.ended_at = time.perf_counter()
    record.seconds = record.ended_at - came_at


def _outcome(transaction: Transaction, answer: Answer | None, lost: int) -> int:
    """The status of an attempt: its answer's, or that of the error that ended it."""
    if transaction.left:
        return LEFT_STATUS
    if answer is not None:
        return answer.status
    return transaction.status if transaction.begun else lost
