"""The hot path: a request of `/v1/*` goes to a replica, its answer back, byte for byte.

The server's own cycle towards the client, our own connection towards the replica, no layer in between. As long as the client
has got nothing, a replica that dies is replaced; later, another one goes on with an event stream (going_on.py), or it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Coroutine
from typing import Any, Generic

import msgspec

from engine.joined_fleet import went_with_its_node
from gateway.api.dialects import error_answer
from gateway.api.endpoints import ENDPOINTS, Endpoint
from gateway.api.engine_errors import error_code, error_in_our_form
from gateway.continuation.events import Diverged
from gateway.continuation.tape import Tape
from gateway.errors import (
    ApiError,
    Forbidden,
    InternalError,
    InvalidRequest,
    NoReplicaReady,
    NotAuthenticated,
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
from gateway.relay.admission import Admission
from gateway.relay.answer import Answer, at_hand, pass_on, says_that_its_engine_died
from gateway.relay.batching import Batching
from gateway.relay.charge import Charge
from gateway.relay.counters import RelayCounters
from gateway.relay.engine_body import EngineBody
from gateway.relay.forms import FormBody, check_tenant, read_form
from gateway.relay.going_on import Rest
from gateway.relay.hidden_usage import UsageHider
from gateway.relay.interfaces import PlanT
from gateway.relay.keep_alive import KeepAlive
from gateway.relay.kept_responses import new_id, owner_of, wanted_keeper
from gateway.relay.large_bodies.pool import LargeBodies
from gateway.relay.outcome import finish, outcome
from gateway.relay.patience import seconds_left, timeout_of, wait_for_replicas
from gateway.relay.quality import with_quality
from gateway.relay.read_body import Looked, read_large, read_small
from gateway.relay.record_queue import RecordQueue
from gateway.relay.request_record import RequestRecord
from gateway.relay.served_fleets import ServedFleet, ServedFleets
from gateway.relay.tracing import begin_trace, passed_lines
from gateway.relay.uploads import Uploads
from gateway.settings import Settings
from gateway.tenants.access import AdminAccess, caller
from gateway.tenants.tenants import TenantContext, Tenants
from gateway.upstream.connection import ConnectionBroke
from gateway.upstream.pool import LocalShortage, Upstream, UpstreamLost, broken

_logger = logging.getLogger(__name__)

ENDING_SECONDS_MAX = 2.0  # in which requests that are ended tell their clients so
# The replica is in trouble and another one may not be; every other answer is the client's.
RETRIED_STATUSES = frozenset({429, 500, 502, 503})


class RelayedRequest(msgspec.Struct, Generic[PlanT], eq=False):
    """A request on its way over one replica or more of a fleet, or over the one that it has to go to, if it is `pinned`.

    `bounds` are fields that its key's limits put into its body, `owner` is whose responses it may keep. A stream that can be
    continued has a `tape`; if it was, `began` is how it had begun, and `rest` how it goes on.
    """

    transaction: Transaction
    record: RequestRecord
    served: ServedFleet[PlanT]
    path: str
    body: EngineBody | FormBody
    plan: PlanT
    info: RequestInfo
    charge: Charge | None = None
    bounds: dict[str, Any] | None = None
    owner: str = ""
    pinned: bool = False
    excluded: frozenset[str] = frozenset()
    tape: Tape | None = None
    began: tuple[PlanT, Attempt] | None = None
    rest: Rest[PlanT] | None = None

    @property
    def hides_usage(self) -> bool:
        """Whether the client of a stream does not get the usage."""
        return self.charge is not None and self.charge.hides_usage

    replicas_ended: int = 0


class Relay(Generic[PlanT]):
    """Serves the endpoints of gateway/api/endpoints.py."""

    def __init__(
        self,
        settings: Settings,
        *,
        fleets: ServedFleets[PlanT],
        upstream: Upstream,
        tenants: Tenants,
        access: AdminAccess,
        limiter: Limiter,
        large_bodies: LargeBodies | None = None,
    ) -> None:
        self.counters = RelayCounters()
        self.draining = False
        self.records = RecordQueue()
        self._settings = settings
        self._fleets = fleets
        self._upstream = upstream
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
        self._idle = asyncio.Event()  # set while draining, once all requests are done

    def use(self, settings: Settings) -> None:
        """Go by these settings from now on."""
        self._settings = settings

    @property
    def in_flight(self) -> int:
        """Requests being served now."""
        return len(self._transactions)

    def __call__(self, endpoint: Endpoint, scope: Scope) -> Awaitable[None]:
        """Serve one POST request to `endpoint`; to be called and awaited by the task that does so."""
        transaction, record = Transaction(scope, ENDPOINTS[endpoint].dialect), RequestRecord(endpoint)
        if self._settings.otlp_traces_endpoint:
            record.trace = begin_trace(transaction.fields.traceparent)
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
            if transaction.leave_turn is not None:
                transaction.leave_turn()
            self._held_bytes -= transaction.body_bytes
            self._slots_taken -= transaction.has_slot
            exchanges.discard(transaction)
            if self.draining and not exchanges:
                self._idle.set()
            finish(record, transaction)
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
        fields, traits = transaction.fields, ENDPOINTS[endpoint]
        patience = timeout_of(fields.timeout)
        tenant = caller(self._tenants, transaction.scope, fields.authorization, fields.host)
        record.tenant = tenant.name
        charge = None if tenant.key is None else Charge(self._limiter, tenant.key, transaction, record)
        if fields.wanted_replica is not None:
            try:
                self._access.check(transaction.scope)
            except NotAuthenticated:
                raise Forbidden("The header 'x-peerkv-replica' is for callers with the admin key.") from None
        owner = owner_of(tenant) if endpoint == "responses" else ""
        if self._settings.lossy and traits.takes_salt:
            tenant = with_quality(tenant, transaction)
        if traits.is_form:
            check_tenant(tenant, transaction.scope["path"])
        elif not fields.is_json:
            raise InvalidRequest("Send the header 'Content-Type: application/json'.", code="invalid_content_type")
        body, read_there, sent = await self._read_body(endpoint, transaction, tenant)
        model = body.get("model") or ""
        served = self._fleets.at_hand(model)
        if charge is not None:
            charge.check_model(model or served.fleet.snapshot().served_model_name)
        if model and not served.models.lists(model):
            served = await self._fleets.find(model)
        known = None if read_there is None else self._fleets.prompt_read_for(served, *read_there)
        record.model = model or served.fleet.snapshot().served_model_name
        record.streamed = body.get("stream") is True and traits.generates
        wanted = fields.wanted_replica
        if endpoint == "responses" and body.get("previous_response_id"):
            names = [replica.name for replica in served.fleet.snapshot().replicas]
            wanted = wanted_keeper(body["previous_response_id"], owner, names, wanted)
        read = await served.planner.read(endpoint, body, tenant, wanted_replica=wanted, known=known)
        bounds = None if charge is None else self._reserve(charge, served, endpoint, body, read)
        if charge is not None and charge.has_to_agree:
            await charge.agree()
        if served.ranked and traits.takes_priority:
            bounds = {**(bounds or {}), "priority": tenant.rank}
        if served.admission is not None:
            if record.streamed:
                self.keep_alive.waits(transaction)
            await self._take_turn(served.admission, tenant, served.planner.uncached_tokens(read), transaction, patience)
        wait_for_replicas(patience, transaction)
        if len(self._transactions) > 1:
            await self._batching.wait()
        plan = served.planner.decide(read)
        if held_bytes := plan.held_bytes:
            self._hold(held_bytes)
            transaction.body_bytes += held_bytes
        info = RequestInfo(transaction.request_id, endpoint, tenant.name, model)
        body_sent = sent(plan.prompt)
        path = transaction.scope["path"]
        request = RelayedRequest(transaction, record, served, path, body_sent, plan, info, charge, bounds)
        request.owner, request.pinned = owner, wanted is not None
        if served.going_on is not None and record.streamed and known is None and wanted is None:
            request.tape = served.going_on.tape(endpoint, body, bounds, plan)
        if record.streamed:
            self.keep_alive.waits(transaction)
        del body, body_sent, known, read_there, sent, read  # what was decoded is many times what is sent
        await self._travel(request)

    async def _take_turn(
        self, admission: Admission, tenant: TenantContext, tokens: int, transaction: Transaction, patience: float | None
    ) -> None:
        """Wait for a place at the replicas, which is given back when the transaction ends. Raises ApiError."""
        await admission.enter(tenant.name, tenant.rank, tokens, seconds_left(patience, transaction), patience)
        transaction.leave_turn = admission.leave

    def _reserve(
        self, charge: Charge, served: ServedFleet[PlanT], endpoint: Endpoint, body: dict[str, Any], read: Any
    ) -> dict[str, Any]:
        """Hold what the request may come to; returns the fields that keep it from coming to more. Raises ApiError."""
        models = served.models.known
        return charge.reserve(
            endpoint,
            body,
            served.planner.prompt_size(read),
            context_tokens=None if models is None else models.context_tokens,
            answer_tokens_default=self._settings.answer_tokens_default,
        )

    async def _read_body(self, endpoint: Endpoint, transaction: Transaction, tenant: TenantContext) -> Looked:
        """Receive a body, take a slot for its request, and decode it. Raises ApiError."""
        settings = self._settings
        raw: bytes | bytearray | None = transaction.body_at_hand(self._hold, settings.body_bytes_max)
        if raw is None:
            raw = await self._upload(transaction, tenant)
        self.take_slot(transaction)
        transaction.watch()
        if transaction.fields.encoding is not None:
            raw = await transaction.decode_body(raw, self._hold, settings.body_bytes_max)
        if ENDPOINTS[endpoint].is_form:
            return await read_form(raw, transaction.scope["headers"])
        if len(raw) > settings.body_inline_bytes_max and self._large_bodies is not None:
            return await read_large(self._large_bodies, endpoint, raw, tenant)
        return read_small(endpoint, raw)

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
        transaction, served, once_more = request.transaction, request.served, request.tape is not None
        for attempts_left in range(self._settings.retry_attempts_max + once_more, -1, -1):
            answer: Answer | None = None
            may_go_on, broke, lost = True, False, LOST_STATUS
            attempt = request.record.attempt = served.recorder.begin(request.plan, request.info)
            request.record.attempts += 1
            try:
                if len(self._transactions) > 1:
                    await self._batching.wait()
                answer = await self._attempt(request, attempt)
                if transaction.begun:
                    return
                if says_that_its_engine_died(answer):
                    may_go_on = self._may_go_on(request, attempt)
            except LocalShortage as error:
                lost = LEFT_STATUS  # it says nothing about the replica
                raise Unavailable(f"The gateway is out of resources: {error}.") from None
            except UpstreamLost as error:
                self.counters.replicas_lost += 1
                # As text: a handler that keeps what is logged shall not keep the request's frames, and its body.
                _logger.warning("request %s lost its replica: %s", transaction.request_id, str(error))
                served.fleet.suspect(request.plan.replica.name)
                if transaction.begun:
                    broke = self._goes_on(request, attempt, error, attempts_left)
                    if broke:
                        continue
                    return
                may_go_on = not error.sent or self._may_go_on(request, attempt, given_up=error.given_up)
            finally:
                served.recorder.ended(attempt, LOST_STATUS if broke else outcome(transaction, answer, lost))
            if answer is None or answer.status in RETRIED_STATUSES:
                try:
                    may_go_on = may_go_on and attempts_left > once_more and not request.pinned
                    retried = may_go_on and self._replan(request)
                except NoReplicaReady:
                    retried = False
                if retried:
                    continue
            if answer is None or says_that_its_engine_died(answer):
                raise ReplicaLost
            if answer.status == 501 or (answer.status == 404 and b'"error"' not in answer.body):  # it has no such route
                raise NotOfThisModel(request.path)
            if answer.status >= 400:
                answer.lines, answer.body = JSON_LINE, error_in_our_form(answer.status, answer.body)
                request.record.error = error_code(answer.body)
                answer.body = error_answer(transaction.dialect, answer.status, answer.body)
            else:
                request.record.ends_with(answer.body)
            if request.charge is not None:
                request.charge.settle()  # so that the headers tell what is left after it
            transaction.answer(answer.status, answer.lines, answer.body)
            return

    def _goes_on(self, request: RelayedRequest[PlanT], attempt: Attempt, error: UpstreamLost, attempts_left: int) -> bool:
        """Have another replica go on with a stream; False if the client has all of it now. Raises ReplicaLost.

        That is done once, and not with a request on which another replica had ended before the stream began.
        """
        tape, going_on = request.tape, request.served.going_on
        once_before = request.rest is not None and error.sent
        if tape is not None and going_on is not None and not once_before and not request.replicas_ended:
            plan, first = request.began = request.began or (request.plan, attempt)
            request.record.prompt_attempt = first
            if tape.is_finished:
                ending = going_on.ending(tape, plan, first)
                request.record.ends_with(ending)
                request.transaction.finish(UsageHider().take(ending) if request.hides_usage else ending)
                return False
            request.excluded |= {request.plan.replica.name}
            request.rest = going_on.rest(tape, plan, first, request.excluded) if attempts_left else None
            if request.rest is not None:
                request.plan = request.rest.plan
                self.counters.streams_continued += 1
                _logger.warning("request %s is continued on %s", request.transaction.request_id, request.plan.replica.name)
                return True
        self.counters.streams_broken += 1
        _logger.warning("request %s is broken off: no other replica can go on with it", request.transaction.request_id)
        raise ReplicaLost from error

    def _may_go_on(self, request: RelayedRequest[PlanT], attempt: Attempt, *, given_up: bool = False) -> bool:
        """Whether another replica may get a request whose replica ended, or stood still, after it had got all of it.

        The request may be the cause. Unless its replica is known to have borne it, one other gets it, and not the last one.
        """
        fleet, recorder = request.served.fleet.snapshot(), request.served.recorder
        if not given_up and (recorder.was_borne(attempt) or went_with_its_node(fleet, request.plan.replica.name)):
            return True
        request.replicas_ended += 1
        left = {replica.name for replica in fleet.ready()} - request.excluded - {request.plan.replica.name}
        return request.replicas_ended == 1 and (given_up or len(left) > 1)

    def _replan(self, request: RelayedRequest[PlanT]) -> bool:
        request.excluded |= {request.plan.replica.name}
        request.plan = request.served.planner.replan(request.plan, exclude=request.excluded)
        self.counters.retries += 1
        return True

    async def _attempt(self, request: RelayedRequest[PlanT], attempt: Attempt) -> Answer | None:
        """The replica's answer, or None when it was streamed to the client. Raises UpstreamLost."""
        transaction, plan, recorder = request.transaction, request.plan, request.served.recorder
        changes: dict[str, Any] = {}
        if plan.cache_salt is not None:
            changes["cache_salt"] = plan.cache_salt
        if plan.kv_transfer_params is not None:
            changes["kv_transfer_params"] = plan.kv_transfer_params
        if request.bounds:
            changes |= request.bounds
        if request.tape is not None and not request.tape.terms.parsed:
            changes["return_token_ids"] = True
        if request.rest is not None:
            changes |= request.rest.changes
        if request.info.endpoint == "responses":
            changes["request_id"] = new_id(request.owner, plan.replica.name)
        parts = request.body.parts(changes)
        lines = b"%bx-request-id: %b\r\n%b" % (
            request.body.type_line,
            transaction.request_id.encode(),
            passed_lines(transaction.fields, request.record.trace),
        )
        if len(self._transactions) > 1:
            await self._batching.wait()
        movable = None if request.pinned else transaction
        response = await self._upstream.post(plan.replica, request.path, lines, parts, movable)
        transaction.replica = plan.replica.name.encode()
        try:
            if request.rest is not None and not response.head.is_event_stream:
                raise Diverged(f"status {response.head.status}")
            answer = at_hand(response)
            if answer is None:
                transaction.answering = lambda: recorder.stream_begins(attempt)
                answer = await pass_on(
                    *(transaction, response, request.record),
                    bytes_max=self._settings.answer_bytes_max,
                    hides_usage=request.hides_usage,
                    tape=request.tape,
                    resumed=None if request.rest is None else request.rest.resumed,
                )
            if answer is not None and (cache := recorder.first_byte(attempt)):
                answer.lines += b"x-peerkv-cache: %b\r\n" % cache
            return answer
        except ConnectionBroke as error:
            raise broken(plan.replica, error, response) from error
        except Diverged as error:
            raise UpstreamLost(f"{plan.replica.name} cannot go on: {error}", sent=True) from error
        finally:
            transaction.answering = None
            self._upstream.release(plan.replica, response)
