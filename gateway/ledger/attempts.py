"""One attempt to serve a request: what was decided for it, and what became of it."""

from collections.abc import Sequence

import msgspec

from gateway.api.body import Endpoint
from gateway.ledger.misses import COLD, NO_MISS, Case, Miss, judge
from gateway.steering.choices import Choice, Decision, Option
from transport.table.deliveries import Delivery, DeliveryReason

_NOTHING = Delivery()
_READS_NO_CACHE = DeliveryReason.READS_NO_CACHE


class Asked(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Whose request it is and for what: `tenant` by name, `model` as the client named it, "" for the served one."""

    request_id: str
    endpoint: Endpoint
    tenant: str
    model: str


class Planned(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A plan as the ledger keeps it, which does not keep the prompt.

    `best_held_tokens` of the prompt were in the cache that held most of it; `reports`: the replica has a table, and so tells
    what it delivers. `why_unknown` says why the token ids are not known, if they are not.
    """

    asked: Asked
    decision: Decision
    tag: int
    at: float  # Unix time, seconds
    prompt_tokens: int
    block_size: int
    best_held_tokens: int = 0
    looked_up: bool = True
    parity_exact: bool = True
    reads_cache: bool = True
    reports: bool = True
    why_unknown: str = ""

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


class Entry(msgspec.Struct, eq=False, gc=False, array_like=True):
    """One attempt. Seconds are since it was sent to its replica; `status` is None while it runs.

    `ids` are the prompt's token ids, for the adapter `lora`, until it is settled: its loss is judged by what was computed of
    them before.
    """

    planned: Planned
    sent_at: float
    ids: Sequence[int] | None = None
    lora: str = ""
    deliveries: tuple[Delivery, ...] = ()
    first_byte_seconds: float | None = None
    ended_seconds: float | None = None
    status: int | None = None
    loss: Miss | None = None
    settle_until: float = 0.0
    plain_loss: Miss | None = None
    """What it loses without any history, by the deliveries so far."""

    @property
    def request_id(self) -> str:
        return self.planned.asked.request_id

    @property
    def settled(self) -> bool:
        return self.loss is not None

    @property
    def steered(self) -> Delivery | None:
        """The delivery that the plan speaks of: that of the longest prompt, and the first of its choices."""
        found = self.deliveries
        if len(found) == 1:
            return found[0]
        return max(found, key=lambda delivery: delivery.prompt_tokens, default=None)

    def judged(self, formerly: int = 0, elsewhere: int = 0) -> Miss:
        """Judge it by what was delivered so far; see Case for the arguments."""
        if formerly or elsewhere:
            return judge(self.case(formerly, elsewhere))
        if self.plain_loss is None:
            self.plain_loss = self._as_most() or judge(self.case())
        return self.plain_loss

    def _as_most(self) -> Miss | None:
        """What `judge` says of most, which got all that anybody had; None for others."""
        plan, found = self.planned, self.deliveries
        if len(found) != 1 or not plan.looked_up or not plan.reads_cache:
            return None
        got, size = found[0], plan.block_size
        delivered = got.local_tokens + got.peer_tokens
        if delivered < plan.decision.best_available_tokens // size * size or got.why is _READS_NO_CACHE:
            return None
        return NO_MISS if delivered or got.prompt_tokens <= size else COLD

    def case(self, formerly: int = 0, elsewhere: int = 0) -> Case:
        """What the attempt is judged by; see Case for the arguments."""
        plan, steered = self.planned, self.steered
        got = _NOTHING if steered is None else steered
        size = plan.block_size  # predictions count in whole blocks, as engines deliver them
        return Case(
            prompt_tokens=plan.prompt_tokens if steered is None else got.prompt_tokens,
            block_size=size,
            predicted_local=plan.local_tokens // size * size,
            predicted_peer=plan.peer_tokens // size * size,
            best_available=plan.best_available_tokens // size * size,
            best_held=plan.best_held_tokens // size * size,
            local=got.local_tokens,
            peer=got.peer_tokens,
            looked_up=plan.looked_up,
            parity_exact=plan.parity_exact,
            reads_cache=plan.reads_cache,
            why=got.why,
            formerly=formerly,
            elsewhere=elsewhere,
        )

    def packed(self) -> "Entry | Packed":
        """The entry without its prompt, in half the memory and a tenth of the objects.

        Itself if some text in it is not one that can be encoded.
        """
        self.ids = self.plain_loss = None
        try:
            return Packed(self.planned.asked.request_id, _encode(self))
        except UnicodeEncodeError:
            return self


class Packed(msgspec.Struct, frozen=True, gc=False):
    """An entry that nothing is expected for any more."""

    request_id: str
    raw: bytes

    def unpacked(self) -> Entry:
        """The entry as it was."""
        return _decode(self.raw)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entry).decode
