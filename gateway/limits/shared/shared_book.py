"""What a gateway tells the server of its reservations and settlements, and what it tells again when a connection broke. Pure.

Each settlement has a number, and an account takes each gateway's numbers once and in their order: so one whose reply was lost
is sent again as it is. What ends while there is no connection is added up by key, and told over the next one. A reservation
whose gateway died is forgotten when its lease is over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, Protocol

import msgspec

from engine.frame_tiers.vault.resp import Reply
from gateway.limits.account import Account, Limit, Shortage
from gateway.limits.book import Reservation
from gateway.limits.shapes import SharedLimitStats
from gateway.limits.shared.commands import AccountUnusable, AnswerRefused, Sender, Told, understood
from gateway.tenants.keys import Key

UNANSWERED_MAX = 65536
"""Settlements that were sent and had no reply; further ones are added up by key until some have."""
PAIRS_MAX = 1024
"""Ids in one settlement: what others hold is free again when their leases are over."""
TOLD_SECONDS_MAX = 1.0
"""So long a refusal stands without the server being asked again."""

_logger = logging.getLogger(__name__)

Verdict = Shortage | None | Literal["alone"]
"""What the server says to a reservation; "alone": it says nothing, so that the gateway has to decide by its own count."""


class Sends(Protocol):
    """A connection; `done` gets the reply, if one comes."""

    def send(self, command: bytes, done: Callable[[Reply], None]) -> None: ...


class Settlement(msgspec.Struct):
    """What is to be charged to a key: of requests that were held there under these ids (each with whether it is known to be
    counted), and of so many that were not."""

    tokens: int = 0
    requests: int = 0
    pairs: list[tuple[bytes, bool]] = []

    def add(self, tokens: int, id: bytes, counted: bool) -> None:
        """One more request that ended."""
        self.tokens += tokens
        if len(self.pairs) < PAIRS_MAX:
            self.pairs.append((id, counted))
        else:
            self.requests += not counted


class Known(NamedTuple):
    """What was told of an account last, at our time `at`."""

    told: Told
    at: float

    def account(self, now: float) -> tuple[Account, float]:
        """The account as it should be now, and the server's time."""
        there = self.told.now + (now - self.at)
        self.told.account.roll(there)
        return self.told.account, there


class SharedBook:
    """One gateway's side; `gateway` is a name that no other has had. Times are of a clock that only goes forward."""

    def __init__(
        self, gateway: str, failed: Callable[[str], None] = lambda why: None, settled: Callable[[], None] = lambda: None
    ) -> None:
        self.alone_requests = self.failures = self.lost_settlements = 0
        self.micros = b""
        self._gateway = gateway.encode()
        self._failed = failed
        self._settled = settled
        self._line: Sends | None = None
        self._epoch = 0
        self._seq = 0
        self._unanswered: dict[int, tuple[str, Settlement]] = {}
        self._waiting: dict[str, Settlement] = {}
        self._asking: dict[int, Callable[[Verdict], None]] = {}
        self._known: dict[str, Known] = {}
        self._unusable: set[str] = set()

    @property
    def is_up(self) -> bool:
        """Whether there is a connection."""
        return self._line is not None

    @property
    def is_settled(self) -> bool:
        """Whether the server knows all that was settled."""
        return not self._unanswered and not self._waiting

    def stats(self) -> SharedLimitStats:
        """How it went so far."""
        return SharedLimitStats(
            up=int(self.is_up),
            alone_requests=self.alone_requests,
            failures=self.failures,
            waiting_settlements=len(self._unanswered) + len(self._waiting),
            lost_settlements=self.lost_settlements,
        )

    def connected(self, line: Sends) -> None:
        """Go on with another connection: first with what has to be told again, then with what ended meanwhile."""
        self._line = line
        self._epoch += 1
        for seq, (name, settlement) in list(self._unanswered.items()):
            self._send_settlement(seq, name, settlement)
        self._tell_waiting()

    def lost(self) -> None:
        """There is no connection any more."""
        self._line = None
        asking, self._asking = self._asking, {}
        for verdict in asking.values():
            verdict("alone")

    def reserve(self, made: Reservation, now: float, verdict: Callable[[Verdict], None]) -> None:
        """Ask for what a reservation holds here."""
        line = self._line
        if line is None:
            verdict("alone")
            return
        self._asking[made.id] = verdict

        def done(reply: Reply) -> None:
            told = self._understood(reply, line, made.key.name)
            if (told is not None or line is self._line) and self._asking.pop(made.id, None) is not None:
                verdict(self._verdict(made, told, now) if isinstance(told, Told) else "alone")

        line.send(self._sender().reserve(made.key, self._id(made), made.tokens), done)

    def forget(self, made: Reservation) -> None:
        """Nobody waits for the verdict any more."""
        self._asking.pop(made.id, None)

    def settle(self, made: Reservation, tokens: int, now: float) -> None:
        """A request that was let in here has ended."""
        name, counted = made.key.name, made.shared == "there"
        known = self._known.get(name)
        if known is not None and counted:
            account, there = known.account(now)
            account.running -= 1
            account.held_tokens -= made.tokens
            account.charge(tokens, there)
        self._waiting.setdefault(name, Settlement()).add(tokens, self._id(made), counted)
        if self._line is not None:
            self._tell_waiting()

    def hold(self, under_way: Iterable[Reservation]) -> None:
        """Say which requests are under way, of those that the server knows, or should."""
        if self._line is None:
            return
        by_name: dict[str, list[Reservation]] = {}
        for made in under_way:
            if made.shared:
                by_name.setdefault(made.key.name, []).append(made)
        for name, some in by_name.items():
            for first in range(0, len(some), PAIRS_MAX):
                self._hold(self._line, name, some[first : first + PAIRS_MAX])

    def refusal(self, key: Key, now: float) -> Shortage | None:
        """What the server lately said that there is too little of, as far as nothing but time changes that."""
        known = self._known.get(key.name)
        if known is None or not known.told.short or now - known.at > TOLD_SECONDS_MAX:
            return None
        account, there = known.account(now)
        short = account.request_shortage(key, there)
        return None if short is None or short.limit is Limit.REQUESTS_IN_FLIGHT else short

    def account(self, name: str, now: float) -> tuple[Account, float] | None:
        """The account of a key as far as it is known, and the server's time; None where the server does not decide."""
        known = self._known.get(name) if self._line is not None else None
        return None if known is None else known.account(now)

    def keep(self, names: Iterable[str]) -> None:
        """Forget what was told of all other keys."""
        kept = set(names)
        self._known = {name: known for name, known in self._known.items() if name in kept}
        self._unusable &= kept

    # Inside

    def _sender(self) -> Sender:
        return Sender(self._gateway, self._epoch, self.micros)

    def _id(self, made: Reservation) -> bytes:
        """The name of a reservation; the server's script reads the tokens out of it."""
        return b"%b:%d:%d" % (self._gateway, made.id, made.tokens)

    def _verdict(self, made: Reservation, told: Told, now: float) -> Verdict:
        self._known[made.key.name] = Known(told, now)
        if not told.short:
            return None
        account, there = told.account, told.now
        short = account.request_shortage(made.key, there) or account.token_shortage(made.key, made.tokens, there)
        if short is None:
            self._failed("it refuses what there is enough of")
            return "alone"
        return short

    def _hold(self, line: Sends, name: str, some: list[Reservation]) -> None:
        def done(reply: Reply) -> None:
            if isinstance(self._understood(reply, line, name), Told):
                for made in some:
                    made.shared = "there"

        line.send(self._sender().hold(name, [(self._id(made), made.shared == "there") for made in some]), done)

    def _tell_waiting(self) -> None:
        while self._waiting and len(self._unanswered) < UNANSWERED_MAX:
            name = next(iter(self._waiting))
            settlement = self._waiting.pop(name)
            self._seq += 1
            self._unanswered[self._seq] = (name, settlement)
            self._send_settlement(self._seq, name, settlement)

    def _send_settlement(self, seq: int, name: str, settlement: Settlement) -> None:
        line = self._line

        def done(reply: Reply) -> None:
            told = None if line is None else self._understood(reply, line, name)
            if told is None:
                return
            self.lost_settlements += told == "unusable"
            self._unanswered.pop(seq, None)
            self._tell_waiting()
            if self.is_settled:
                self._settled()

        if line is not None:
            line.send(self._sender().settle(name, seq, settlement.tokens, settlement.requests, settlement.pairs), done)

    def _understood(self, reply: Reply, line: Sends, name: str) -> Told | Literal["unusable"] | None:
        """What the connection that is in use tells of a key's account; what cannot be understood ends it."""
        if line is not self._line:
            return None
        try:
            told = understood(reply)
        except AnswerRefused as error:
            self._failed(str(error))
            return None
        except AccountUnusable as error:
            self._cannot_use(name, error)
            return "unusable"
        if told is None:
            self._failed("another connection took this one's place")
        elif name in self._unusable:
            self._unusable.remove(name)
            _logger.info("limits of the key '%s' are counted at the server again", name)
        return told

    def _cannot_use(self, name: str, why: AccountUnusable) -> None:
        """Count it, and log it once until the account can be used; what was told of it before is as good as nothing."""
        self.failures += 1
        self._known.pop(name, None)
        if name not in self._unusable:
            self._unusable.add(name)
            _logger.error("limits of the key '%s' are counted by this gateway alone: its account at the server: %s", name, why)
