"""What a plan knows of requests beside it: bursts, promises, queues, full caches."""

import asyncio

from gateway.planner.plan import Plan
from gateway.steering.steer import Choice
from tests.unit.gateway.planner.planned_fleet import IDS, LONG, Place
from transport.table.deliveries import Delivery


async def test_a_burst_of_equal_prompts_is_computed_once(place: Place) -> None:
    plans = []
    for _ in range(50):
        plans.append(await place.plan(LONG))
        place.begin(plans[-1])
    computed = [plan for plan in plans if plan.decision.expected.computed_tokens > len(LONG) // 2]
    assert len(computed) <= 2  # at most once a replica
    assert len({plan.tag for plan in plans}) == 50


async def test_of_requests_that_come_at_once_each_plan_knows_of_those_before_it(place: Place) -> None:
    async def ask() -> Plan:
        plan = await place.plan(LONG)
        place.begin(plan)
        return plan

    await place.occupy("a")  # who is not alone waits for the others before it is planned
    plans = await asyncio.gather(*(ask() for _ in range(50)))
    computed = [plan for plan in plans if plan.decision.expected.computed_tokens > len(LONG) // 2]
    assert len(computed) <= 2
    assert sum(place.planner.in_flight().values()) == 51


async def test_a_prompt_cache_key_keeps_together_what_nobody_holds(place: Place) -> None:
    prompts = [[first, *LONG] for first in range(8)]
    homes = {(await place.plan(prompt, prompt_cache_key="session")).replica.name for prompt in prompts}
    assert len(homes) == 1
    spread = {(await place.plan(prompt, prompt_cache_key=f"session {prompt[0]}")).replica.name for prompt in prompts}
    assert spread == {"a", "b"}
    malformed = {(await place.plan(prompt, prompt_cache_key=["session"])).replica.name for prompt in prompts}
    assert malformed == {"a", "b"}


async def test_a_request_that_relies_on_a_promise_may_be_served_by_another_holder(place: Place) -> None:
    place.begin(await place.plan(LONG, wanted="a"))
    relying = await place.plan(LONG, wanted="a")
    assert (relying.decision.action, relying.predicted_tokens) == (Choice.HIT, 600)
    assert relying.kv_transfer_params == {"peerkv": {"tag": relying.tag}}


async def test_a_promise_ends_with_the_request_that_made_it(place: Place) -> None:
    first = await place.plan(LONG)
    place.begin(first)
    assert (await place.plan(LONG)).predicted_tokens == 600
    place.end(first)
    assert (await place.plan(LONG)).predicted_tokens == 0


async def test_an_engines_own_words_send_requests_elsewhere(place: Place) -> None:
    place.tables.writers["a"].tell_load((1, 0, 4000, 0))
    chosen = {(await place.plan([first, *LONG])).replica.name for first in range(4)}
    assert chosen == {"b"}


async def test_a_full_cache_is_dear_once_what_it_gave_up_was_asked_for_again(place: Place) -> None:
    """Until then its price is a belief; a request for what nobody holds any more confirms it, and others soon wear it away."""
    planner, writer = place.planner, place.tables.writers["a"]
    await place.plan(LONG)
    assert planner.evictions.again().tokens == 1.0

    def give_up(tag: int) -> None:
        writer.count("evictions", 64)
        writer.deliver(Delivery(tag=tag, arrived_ns=tag * 10**9, first_token_ns=tag * 10**9), "")

    for tag in range(1, 40):
        give_up(tag)
    await place.plan(IDS)
    cheap = planner.evictions.again().tokens
    assert cheap < 0.1
    await place.plan(LONG)
    assert planner.evictions.again().tokens > 2 * cheap


async def test_a_prompt_that_somebody_holds_or_computes_was_not_given_up(place: Place) -> None:
    planner = place.planner
    place.begin(await place.plan(LONG))
    place.tables.writers["a"].count("evictions", 1000)
    place.tables.writers["a"].deliver(Delivery(tag=1, first_token_ns=1), "")
    await place.plan(IDS)
    before = planner.evictions.again()
    await place.plan(LONG)
    place.tables.hold("b", IDS)
    await place.plan(IDS)
    assert planner.evictions.again() == before


async def test_a_full_cache_keeps_what_it_has_and_a_free_one_takes_the_prompt(place: Place) -> None:
    place.tables.hold("a", list(range(9000, 9000 + 250 * 4)))
    assert [(await place.plan(LONG)).replica.name for _ in range(4)] == ["b"] * 4
