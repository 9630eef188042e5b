"""One attempt to serve a request: what was decided for it, its part in its replica's load, and what became of it."""

import msgspec

from gateway.api.endpoints import Endpoint
from gateway.ledger.misses import Miss
from gateway.planner.promotions import Promotion
from gateway.steering.choices import Choice, Decision, Option
from gateway.steering.in_flight import Flight
from transport.table.deliveries import Delivery


class RequestInfo(msgspec.Struct, frozen=True, gc=False):
    """Whose request it is and for what: `tenant` by name, `model` as the client named it, "" for the served one."""

    request_id: str
    endpoint: Endpoint
    tenant: str
    model: str


class Attempt(msgspec.Struct, eq=False, gc=False, kw_only=True):
    """A request with one replica. It does not keep the prompt.

    `at` is Unix time and `began_at` of the ledger's clock, both in seconds; other seconds are since then. `best_held_tokens` of
    the prompt were in the cache that held most of it, `formerly_tokens` were asked for before; `flushed`: not since caches were
    emptied on request. `reports`: the replica has a table, and so tells what it delivers. `why_unknown` says why the token ids
    are not known, if they are not.

    `flight` is the attempt while it weighs on its replica. `status` is None until it is over, `miss` until it is settled.
    Of the `deliveries` that came so far, `steered` is the one that the plan speaks of, that of the longest prompt and the first
    of its choices, and `judged` what `judge` made of them.
    """

    info: RequestInfo
    decision: Decision
    tag: int
    at: float
    began_at: float
    prompt_tokens: int
    block_size: int
    best_held_tokens: int = 0
    formerly_tokens: int = 0
    flushed: bool = False
    looked_up: bool = True
    parity_exact: bool = True
    reads_cache: bool = True
    reports: bool = True
    why_unknown: str = ""
    pinned: bool = False  # the caller chose the replica
    promotion: Promotion | None = None  # what disk and vault were asked for it

    flight: Flight | None = None
    deliveries: tuple[Delivery, ...] = ()
    steered: Delivery | None = None
    judged: Miss | None = None
    first_byte_seconds: float | None = None
    ended_seconds: float | None = None
    status: int | None = None
    settle_until: float = 0.0
    miss: Miss | None = None

    @property
    def replica(self) -> str:
        return self.decision.replica

    @property
    def source(self) -> str:
        """The replica to import from, "" for none."""
        return self.decision.source or ""

    @property
    def action(self) -> Choice:
        return self.decision.action

    @property
    def reason(self) -> str:
        """The decision in words."""
        return self.decision.reason if self.looked_up else f"{self.decision.reason} ({self.why_unknown})"

    @property
    def local_tokens(self) -> int:
        return self.decision.expected.local_tokens

    @property
    def peer_tokens(self) -> int:
        return self.decision.expected.peer_tokens

    @property
    def best_available_tokens(self) -> int:
        return self.decision.best_available_tokens

    @property
    def options(self) -> tuple[Option, ...]:
        """What was considered, best first."""
        return self.decision.options

    @property
    def settled(self) -> bool:
        return self.miss is not None

    def add(self, delivery: Delivery) -> None:
        """The engine left one more record of it."""
        self.deliveries += (delivery,)
        if self.steered is None or delivery.prompt_tokens > self.steered.prompt_tokens:
            self.steered = delivery
        self.judged = None
