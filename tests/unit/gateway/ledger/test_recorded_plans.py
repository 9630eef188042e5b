"""From plans to the ledger: what the planner decides over real tables is what the ledger tells of."""

import time
from pathlib import Path
from typing import Any

import pytest

from gateway.ledger.attempts import Attempt, RequestInfo
from gateway.ledger.ledger import LOST_STATUS, Ledger
from gateway.ledger.misses import MissReason
from gateway.ledger.recorder import Recorder
from gateway.planner.plan import Plan
from gateway.planner.planner import Planner
from gateway.prompts.parity import KindVerdict, Parity, ParityVerdict
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService
from gateway.stats.explain import explain
from gateway.steering.costs.model import ModelKey, Outcome
from gateway.steering.costs.replica_load import IDLE
from gateway.tenants.tenants import ANONYMOUS, TenantContext
from tests.unit.gateway.planner.planned_fleet import EXACT, Bounds
from tests.unit.gateway.prompts.tiny_model import make_model
from tests.unit.transport.replica_tables import ReplicaTables, StandingFleet
from transport.table.deliveries import Delivery
from transport.table.directory import TableDirectory

IDS = list(range(2, 402))
HELD = 396  # in whole blocks of four, and the last token is always computed


class Scene:
    def __init__(self, tables: ReplicaTables, model: Path) -> None:
        self.tables = tables
        tokens = TokenService(TokenizerSource(str(model)))
        tokens.load()
        fleet = StandingFleet("a", "b", directory=tables.directory)
        self.planner = Planner(fleet, TableDirectory(tables.directory), tokens, Bounds())
        self.planner.prompts.parity = EXACT
        self.recorder = Recorder(Ledger(100), self.planner)

    async def send(
        self,
        body: dict[str, Any],
        *,
        wanted: str | None = None,
        endpoint: Any = "completions",
        tenant: TenantContext = ANONYMOUS,
    ) -> tuple[Plan, Attempt]:
        plan = await self.planner.plan(endpoint, body, tenant, wanted_replica=wanted)
        return plan, self.recorder.begin(plan, RequestInfo("r", endpoint, tenant.name, "m"))

    def answer(self, plan: Plan, attempt: Attempt, *, local: int = 0, peer: int = 0, tokens: int = len(IDS)) -> MissReason:
        record = Delivery(
            plan.tag, 1, 1, 2, 3, tokens, local, peer, tokens - local - peer, source=plan.source or "" if peer else ""
        )
        if plan.replica.name in self.tables.writers:
            self.tables.writers[plan.replica.name].deliver(record, "shared_memory")
        self.recorder.first_byte(attempt)
        self.recorder.ended(attempt, 200)
        self.recorder.catch_up()
        assert attempt.miss is not None
        return attempt.miss.reason


@pytest.fixture
def scene(two_tables: ReplicaTables, tmp_path: Path) -> Scene:
    return Scene(two_tables, make_model(tmp_path / "model"))


async def test_a_pull_is_entered_with_what_was_expected_and_considered(scene: Scene) -> None:
    scene.tables.hold("a", IDS)
    plan, attempt = await scene.send({"prompt": IDS}, wanted="b")
    assert plan.kv_transfer_params is not None
    assert plan.kv_transfer_params["peerkv"]["tag"] == attempt.tag
    assert (attempt.action, attempt.source, attempt.block_size) == ("pull", "a", 4)
    assert (attempt.peer_tokens, attempt.best_available_tokens) == (HELD, HELD)
    assert scene.answer(plan, attempt, peer=HELD) is MissReason.NONE
    (shown,) = explain("r", scene.recorder.ledger.attempts("r"), {}).attempts
    assert shown.expected.first_token_seconds == pytest.approx(plan.decision.expected.seconds)
    assert shown.options
    assert shown.options[0].seconds == pytest.approx(plan.decision.options[0].expected.seconds)


async def test_computing_because_imports_are_slow_is_load(scene: Scene) -> None:
    scene.tables.hold("a", IDS)
    table = scene.planner.fleet.now().tables["a"]
    key = ModelKey("cpu", table.fingerprint.hex()[:16])
    for _ in range(50):
        scene.planner.costs.observe(
            Outcome(key, "b", "a", "shared_memory", IDLE, time.monotonic(), 400, 4, HELD, 60.0, 60.1, 60.0, 1_000_000)
        )
    plan, attempt = await scene.send({"prompt": IDS}, wanted="b")
    assert (attempt.action, attempt.best_available_tokens) == ("recompute", HELD)
    assert scene.answer(plan, attempt) is MissReason.LOAD
    assert attempt.miss is not None
    assert attempt.miss.tokens == HELD


async def test_the_header_tells_of_all_choices_though_a_plan_between_read_the_first_ones_record(scene: Scene) -> None:
    plan, attempt = await scene.send({"prompt": IDS, "n": 2}, wanted="a")
    engine = scene.tables.writers["a"]
    engine.deliver(Delivery(plan.tag, 1, 1, 2, 3, len(IDS), 0, 0, len(IDS)), "shared_memory")
    await scene.send({"prompt": [5] * 50})
    engine.deliver(Delivery(plan.tag, 1, 1, 2, 3, len(IDS), HELD, 0, len(IDS) - HELD), "shared_memory")
    assert scene.recorder.first_byte(attempt).startswith(b"local=396, peer=0, computed=404")


async def test_a_prompt_that_another_request_was_still_computing_was_promised(scene: Scene) -> None:
    first, first_attempt = await scene.send({"prompt": IDS})
    second, attempt = await scene.send({"prompt": IDS})
    assert second.replica.name == first.replica.name
    assert (attempt.best_available_tokens, attempt.best_held_tokens) == (HELD, 0)
    assert scene.answer(second, attempt) is MissReason.PROMISED
    assert scene.answer(first, first_attempt) is MissReason.COLD


async def test_a_chat_whose_ids_are_not_the_engines_is_a_parity_loss(scene: Scene) -> None:
    scene.planner.prompts.parity = ParityVerdict(KindVerdict(Parity.EXACT), KindVerdict(Parity.OFF))
    plan, attempt = await scene.send({"messages": [{"role": "user", "content": "hello"}]}, endpoint="chat")
    assert scene.answer(plan, attempt) is MissReason.PARITY


async def test_a_request_that_reads_no_cache_is_off(scene: Scene) -> None:
    scene.tables.hold("a", IDS)
    plan, attempt = await scene.send({"prompt": IDS, "prompt_logprobs": 1})
    assert scene.answer(plan, attempt) is MissReason.OFF


async def test_a_replica_without_a_table_is_off(scene: Scene) -> None:
    scene.tables.stop("a")
    plan, attempt = await scene.send({"prompt": IDS}, wanted="a")
    assert scene.answer(plan, attempt) is MissReason.OFF


async def test_what_was_asked_for_before_a_flush_was_flushed_and_what_was_asked_for_since_was_evicted(scene: Scene) -> None:
    assert scene.answer(*await scene.send({"prompt": IDS})) is MissReason.COLD
    scene.planner.flushed()
    assert scene.answer(*await scene.send({"prompt": IDS})) is MissReason.FLUSHED
    assert scene.answer(*await scene.send({"prompt": IDS})) is MissReason.EVICTED


async def test_several_prompts_in_one_request_are_told_of_together(scene: Scene) -> None:
    plan, attempt = await scene.send({"prompt": [IDS, IDS[:40]]})
    record = Delivery(plan.tag, 1, 1, 2, 3, 40, 0, 0, 40)
    scene.tables.writers[plan.replica.name].deliver(record, "shared_memory")
    assert scene.answer(plan, attempt) is MissReason.COLD
    assert sum(delivery.computed_tokens for delivery in attempt.deliveries) == 440


async def test_a_prompt_that_was_asked_for_and_that_nobody_holds_any_more_was_evicted(scene: Scene) -> None:
    assert scene.answer(*await scene.send({"prompt": IDS})) is MissReason.COLD
    plan, attempt = await scene.send({"prompt": IDS})
    assert scene.answer(plan, attempt) is MissReason.EVICTED
    assert attempt.miss is not None
    assert 0.75 * HELD <= attempt.miss.tokens <= HELD


async def test_what_another_tenant_asked_for_is_cold(scene: Scene) -> None:
    assert scene.answer(*await scene.send({"prompt": IDS}, tenant=TenantContext("one", "salt-1"))) is MissReason.COLD
    assert scene.answer(*await scene.send({"prompt": IDS}, tenant=TenantContext("two", "salt-2"))) is MissReason.COLD


async def test_an_attempt_weighs_on_its_replica_until_it_ends_and_keeps_nothing_of_its_prompt(scene: Scene) -> None:
    _, attempt = await scene.send({"prompt": IDS}, wanted="a")
    assert scene.planner.in_flight() == {"a": 1}
    scene.recorder.ended(attempt, LOST_STATUS)
    assert scene.planner.in_flight() == {}
    assert attempt.flight is None
