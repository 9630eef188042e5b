"""From plans to the ledger: what the planner decides over real tables is what the ledger tells of."""

import time
from pathlib import Path
from typing import Any

import pytest

from gateway.ledger.attempts import Asked, Entry
from gateway.ledger.history import SeenPrefixes
from gateway.ledger.ledger import Ledger
from gateway.ledger.misses import MissReason
from gateway.ledger.plan_witness import PlanWitness
from gateway.ledger.recorder import Recorder
from gateway.planner.plan import Plan
from gateway.planner.planner import Planner
from gateway.prompts.parity import KindVerdict, Parity, ParityVerdict
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService
from gateway.stats.explain import explain
from gateway.steering.costs.model import ModelKey, Outcome
from gateway.steering.costs.replica_load import IDLE
from gateway.tenants.tenants import ANONYMOUS
from tests.unit.gateway.planner.test_planner import EXACT, Bounds
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
        registry = self.planner.registry
        self.recorder = Recorder(Ledger(100), SeenPrefixes(100), self.planner.feed, registry, lambda name: "")
        self.witness = PlanWitness(self.recorder, self.planner)

    async def send(
        self, body: dict[str, Any], *, pinned: str | None = None, endpoint: Any = "completions"
    ) -> tuple[Plan, Entry]:
        plan = await self.planner.plan(endpoint, body, ANONYMOUS, pinned=pinned)
        self.planner.started(plan)
        return plan, self.witness.sent(plan, Asked("r", endpoint, ANONYMOUS.name, "m"))

    def answer(self, plan: Plan, entry: Entry, *, local: int = 0, peer: int = 0, tokens: int = len(IDS)) -> MissReason:
        record = Delivery(
            plan.tag, 1, 1, 2, 3, tokens, local, peer, tokens - local - peer, source=plan.source or "" if peer else ""
        )
        if plan.replica.name in self.tables.writers:
            self.tables.writers[plan.replica.name].deliver(record, "shared_memory")
        self.witness.first_byte(entry)
        self.planner.finished(plan)
        self.witness.ended(entry, 200)
        self.recorder.catch_up()
        assert entry.loss is not None
        return entry.loss.reason


@pytest.fixture
def scene(two_tables: ReplicaTables, tmp_path: Path) -> Scene:
    return Scene(two_tables, make_model(tmp_path / "model"))


async def test_a_pull_is_entered_with_what_was_expected_and_considered(scene: Scene) -> None:
    scene.tables.hold("a", IDS)
    plan, entry = await scene.send({"prompt": IDS}, pinned="b")
    assert plan.kv_transfer_params is not None
    assert plan.kv_transfer_params["peerkv"]["tag"] == entry.planned.tag
    assert (entry.planned.action, entry.planned.source, entry.planned.block_size) == ("pull", "a", 4)
    assert (entry.planned.peer_tokens, entry.planned.best_available_tokens) == (HELD, HELD)
    assert scene.answer(plan, entry, peer=HELD) is MissReason.NONE
    (attempt,) = explain("r", scene.recorder.ledger.attempts("r")).attempts
    assert attempt.expected.first_token_seconds == pytest.approx(plan.decision.expected.seconds)
    assert attempt.options
    assert attempt.options[0].seconds == pytest.approx(plan.decision.options[0].expected.seconds)


async def test_computing_because_imports_are_slow_is_load(scene: Scene) -> None:
    scene.tables.hold("a", IDS)
    table = scene.planner.registry.tables()["a"]
    key = ModelKey("cpu", table.fingerprint.hex()[:16])
    for _ in range(50):
        scene.planner.costs.observe(
            Outcome(key, "b", "a", "shared_memory", IDLE, time.monotonic(), 400, 4, HELD, 60.0, 60.1, 60.0, 1_000_000)
        )
    plan, entry = await scene.send({"prompt": IDS}, pinned="b")
    assert (entry.planned.action, entry.planned.best_available_tokens) == ("recompute", HELD)
    assert scene.answer(plan, entry) is MissReason.LOAD
    assert entry.loss is not None
    assert entry.loss.tokens == HELD


async def test_the_header_tells_of_all_choices_though_a_plan_between_read_the_first_ones_record(scene: Scene) -> None:
    plan, entry = await scene.send({"prompt": IDS, "n": 2}, pinned="a")
    engine = scene.tables.writers["a"]
    engine.deliver(Delivery(plan.tag, 1, 1, 2, 3, len(IDS), 0, 0, len(IDS)), "shared_memory")
    await scene.send({"prompt": [5] * 50})
    engine.deliver(Delivery(plan.tag, 1, 1, 2, 3, len(IDS), HELD, 0, len(IDS) - HELD), "shared_memory")
    scene.planner.first_byte(plan)  # in this order the relay calls them
    assert scene.witness.first_byte(entry).startswith(b"local=396, peer=0, computed=404")


async def test_a_prompt_that_another_request_was_still_computing_was_promised(scene: Scene) -> None:
    first, first_entry = await scene.send({"prompt": IDS})
    second, entry = await scene.send({"prompt": IDS})
    assert second.replica.name == first.replica.name
    assert (entry.planned.best_available_tokens, entry.planned.best_held_tokens) == (HELD, 0)
    assert scene.answer(second, entry) is MissReason.PROMISED
    assert scene.answer(first, first_entry) is MissReason.COLD


async def test_a_chat_whose_ids_are_not_the_engines_is_a_parity_loss(scene: Scene) -> None:
    scene.planner.prompts.parity = ParityVerdict(KindVerdict(Parity.EXACT), KindVerdict(Parity.OFF))
    plan, entry = await scene.send({"messages": [{"role": "user", "content": "hello"}]}, endpoint="chat")
    assert scene.answer(plan, entry) is MissReason.PARITY


async def test_a_request_that_reads_no_cache_is_off(scene: Scene) -> None:
    scene.tables.hold("a", IDS)
    plan, entry = await scene.send({"prompt": IDS, "prompt_logprobs": 1})
    assert scene.answer(plan, entry) is MissReason.OFF


async def test_a_replica_without_a_table_is_off(scene: Scene) -> None:
    scene.tables.stop("a")
    plan, entry = await scene.send({"prompt": IDS}, pinned="a")
    assert scene.answer(plan, entry) is MissReason.OFF


async def test_several_prompts_in_one_request_are_told_of_together(scene: Scene) -> None:
    plan, entry = await scene.send({"prompt": [IDS, IDS[:40]]})
    record = Delivery(plan.tag, 1, 1, 2, 3, 40, 0, 0, 40)
    scene.tables.writers[plan.replica.name].deliver(record, "shared_memory")
    assert scene.answer(plan, entry) is MissReason.COLD
    assert sum(delivery.computed_tokens for delivery in entry.deliveries) == 440
