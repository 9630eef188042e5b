"""Who waits for whom."""

import asyncio

from gateway.relay.batching import WAITING_MAX, Batching


async def steps(count: int) -> list[tuple[int, int]]:
    """So many tasks take two steps each, abreast in between; returns (task, step) in the order in which they were taken."""
    place, taken = Batching(), list[tuple[int, int]]()

    async def task(number: int) -> None:
        taken.append((number, 1))
        await place.wait()
        taken.append((number, 2))

    await asyncio.gather(*(task(number) for number in range(count)))
    return taken


async def test_each_step_is_taken_by_all_before_anybody_takes_the_next_one() -> None:
    assert await steps(5) == [(number, step) for step in (1, 2) for number in range(5)]


async def test_of_a_great_burst_only_some_wait() -> None:
    taken = await steps(WAITING_MAX + 2)
    late = [(number, 2) for number in range(WAITING_MAX)]
    assert taken[-WAITING_MAX:] == late
    assert taken[WAITING_MAX:-WAITING_MAX] == [(number, step) for number in (WAITING_MAX, WAITING_MAX + 1) for step in (1, 2)]


async def test_who_is_cancelled_while_waiting_waits_no_more() -> None:
    place = Batching()
    for _ in range(2 * WAITING_MAX):
        task = asyncio.ensure_future(place.wait())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    order: list[str] = []

    async def other() -> None:
        order.append("other")

    soon = asyncio.ensure_future(other())
    await place.wait()
    order.append("first")
    await soon
    assert order == ["other", "first"]
