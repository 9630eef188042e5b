"""Two gateways whose clocks are apart, and what can go wrong between them and the server: every sum comes out true."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from engine.frame_tiers.vault.address import VaultAddress
from gateway.limits.account import Account, Shortage
from gateway.limits.book import LimitBook, Reservation
from gateway.limits.shared.commands import LEASE_SECONDS
from gateway.limits.shared.shared_book import SharedBook, Verdict
from gateway.limits.windows import WINDOW_SECONDS
from gateway.tenants.keys import Key
from tests.unit.gateway.limits.limited_keys import limited
from tests.unit.gateway.limits.shared.wires import Fault, Server, Wire, fresh_name

MIDNIGHT = 20_000 * 86400.0
NEVER = 1e9
FAULTS = st.sampled_from(["none", "none", "none", "request lost", "reply lost", "request late"])


class Gateway:
    """One gateway's part; `skew` is how far its clock is off. `untold` is what the server was not told while it was away."""

    def __init__(self, server: Server, name: str, skew: float) -> None:
        self.server, self.name, self.skew, self.lives = server, name, skew, 0
        self.wires: list[Wire] = []
        self.begin()

    def begin(self) -> None:
        self.lives += 1
        self.book = LimitBook(NEVER)
        self.shared = SharedBook(f"{self.name}-{self.lives}")
        self.open: dict[int, Reservation] = {}
        self.untold = 0
        self.reconnect()

    def reconnect(self) -> None:
        self.shared.lost()
        self.wire = Wire(self.server)
        self.wires.append(self.wire)
        self.shared.connected(self.wire)
        self.untold = 0

    def reserve(self, key: Key, asked: int, now: float) -> tuple[Reservation, Verdict] | None:
        """As Limiter does it: by its own count, and then by that of all; None if nobody was asked."""
        local = now + self.skew
        made = self.book.begin(key, local)
        if isinstance(made, Shortage):
            return None
        if self.book.hold(made.id, asked, local) is not None:
            assert self.book.withdraw(made.id, local)
            return None
        found: list[Verdict] = []
        self.shared.reserve(made, now, found.append)
        if self.wire.broken:
            self.reconnect()
        [verdict] = found
        if isinstance(verdict, Shortage):
            assert self.book.withdraw(made.id, local)
        else:
            made.shared = "there" if verdict is None else "here"
            self.open[made.id] = made
        return made, verdict

    def settle(self, made: Reservation, tokens: int, now: float) -> None:
        assert self.book.settle(made.id, tokens, now + self.skew)
        assert not self.book.settle(made.id, tokens, now + self.skew)
        self.shared.settle(made, tokens, now)
        if self.wire.broken and self.shared.is_up:
            self.reconnect()
        elif not self.shared.is_up:
            self.untold += tokens


class TwoGateways(RuleBasedStateMachine):
    """Requests of one key. `true_sum` is what all settlements charged, but for those that a crash kept from being told.

    `exact`: the server decided on every request, so `leases` are the reservations that it knows; `kept`: none of them ran out
    before its request had ended, so no limit was exceeded.
    """

    server: Server

    @initialize(requests=st.integers(4, 40), tokens=st.integers(40, 400), running=st.integers(2, 8), day=st.integers(100, 900))
    def begin(self, requests: int, tokens: int, running: int, day: int) -> None:
        self.key = limited(
            *(fresh_name(),),
            requests_per_minute=requests,
            tokens_per_minute=tokens,
            requests_in_flight_max=running,
            tokens_per_day=day,
        )
        self.now = MIDNIGHT + 0.5
        self.gateways = [Gateway(self.server, "a", 0.0), Gateway(self.server, "b", 1234.5)]
        self.true_sum = 0
        self.exact = self.kept = True
        self.leases: dict[tuple[int, int, int], tuple[int, float]] = {}
        self.begun: list[float] = []
        self.tick(0.0)

    def tick(self, seconds: float) -> None:
        self.now += seconds
        for gateway in self.gateways:
            gateway.shared.micros = b"%d" % round(self.now * 1_000_000)
        self.kept = self.kept and all(ends > self.now for _, ends in self.leases.values())

    def look(self) -> Account:
        return self.server.look(self.key, self.gateways[0].shared.micros)

    @rule(which=st.integers(0, 1), asked=st.integers(1, 40), fault=FAULTS)
    def reserve(self, which: int, asked: int, fault: Fault) -> None:
        gateway = self.gateways[which]
        gateway.wire.fault = fault
        found = gateway.reserve(self.key, asked, self.now)
        gateway.wire.fault = "none"
        if found is None:
            return
        made, verdict = found
        self.exact = self.exact and verdict != "alone"
        if verdict is None:
            self.begun.append(self.now)
            self.leases[which, gateway.lives, made.id] = (asked, self.now + LEASE_SECONDS)

    @rule(which=st.integers(0, 1), choice=st.integers(0, 99), share=st.floats(0.1, 1), fault=FAULTS)
    def settle(self, which: int, choice: int, share: float, fault: Fault) -> None:
        gateway = self.gateways[which]
        if not gateway.open:
            return
        made = gateway.open.pop(sorted(gateway.open)[choice % len(gateway.open)])
        gateway.wire.fault = fault
        tokens = int(made.tokens * share)
        gateway.settle(made, tokens, self.now)
        gateway.wire.fault = "none"
        self.true_sum += tokens
        if gateway.shared.is_up:
            self.leases.pop((which, gateway.lives, made.id), None)

    @rule(seconds=st.floats(0.1, 45))
    def time_passes(self, seconds: float) -> None:
        """Both say in time that they are still there, but for one that is cut off."""
        for _ in range(5):
            self.tick(seconds / 5)
            for which in range(2):
                self.beat(which)

    @rule(seconds=st.floats(0.1, 70))
    def time_stands_still_for_both(self, seconds: float) -> None:
        self.tick(seconds)

    @rule(which=st.integers(0, 1))
    def beat(self, which: int) -> None:
        gateway = self.gateways[which]
        if gateway.shared.is_up:
            gateway.shared.hold(gateway.open.values())
            for made in gateway.open.values():
                self.leases[which, gateway.lives, made.id] = (made.tokens, self.now + LEASE_SECONDS)

    @rule(which=st.integers(0, 1))
    def cut_off(self, which: int) -> None:
        self.gateways[which].shared.lost()

    @rule(which=st.integers(0, 1))
    def crash(self, which: int) -> None:
        """And another one starts in its place. What was under way charges nothing, nor what could not be told."""
        gateway = self.gateways[which]
        self.true_sum -= gateway.untold
        gateway.begin()
        self.tick(0.0)

    @precondition(lambda self: any(wire.late for gateway in self.gateways for wire in gateway.wires))
    @rule()
    def what_was_late_comes(self) -> None:
        """After whatever was said over newer connections. A reservation may take its place once more, until its lease ends."""
        self.exact = False
        for gateway in self.gateways:
            for wire in gateway.wires:
                wire.deliver_late()

    @rule(which=st.integers(0, 1))
    def connection_is_back(self, which: int) -> None:
        gateway = self.gateways[which]
        if not gateway.shared.is_up:
            gateway.reconnect()
            for each in [each for each in self.leases if each[:2] == (which, gateway.lives) and each[2] not in gateway.open]:
                del self.leases[each]  # they ended meanwhile

    @invariant()
    def sums_are_true_and_no_limit_is_exceeded_where_the_server_decides(self) -> None:
        if not hasattr(self, "gateways"):
            return
        account = self.look()
        untold = sum(gateway.untold for gateway in self.gateways)
        assert account.state.day.spent == self.true_sum - untold
        assert all(gateway.shared.is_settled for gateway in self.gateways if gateway.shared.is_up)
        if not self.exact:
            return
        held = [tokens for tokens, ends in self.leases.values() if ends > self.now]
        assert (account.running, account.held_tokens) == (len(held), sum(held))
        if untold:
            return
        lately, key = sum(at > self.now - WINDOW_SECONDS for at in self.begun), self.key
        assert lately <= account.state.requests.total <= key.requests_per_minute
        if self.kept:
            assert account.running <= key.requests_in_flight_max
            assert account.state.day.spent + account.held_tokens <= key.tokens_per_day
            assert account.state.tokens.total + account.held_tokens <= key.tokens_per_minute

    def teardown(self) -> None:
        """Whatever happened: once all have ended and are connected, nothing is held, and what was charged is what was used."""
        if not hasattr(self, "gateways"):
            return
        for which in range(2):
            self.connection_is_back(which)
        for gateway in self.gateways:
            for made in gateway.open.values():
                gateway.settle(made, made.tokens // 2, self.now)
                self.true_sum += made.tokens // 2
            for wire in gateway.wires:
                wire.deliver_late()
        self.tick(LEASE_SECONDS + 0.1)
        account = self.look()
        assert account.state.day.spent == self.true_sum
        assert (account.running, account.held_tokens) == (0, 0)


@pytest.fixture
def server(valkey_address: VaultAddress) -> Iterator[Server]:
    made = Server(valkey_address)
    yield made
    made.close()


def test_any_interleaving_of_crash_retry_and_time_out_ends_at_the_true_sum(server: Server) -> None:
    machine = type("Machine", (TwoGateways,), {"server": server})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
