"""Work in threads: where none can be started it is an error that passes, and nothing is done that was given up."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from engine.node.threads import in_thread
from tests.unit.shortages import no_threads
from transport.node.messages import NodeError


async def test_what_found_no_thread_is_not_done_later_either() -> None:
    done: list[int] = []
    with ThreadPoolExecutor(1, "short") as pool:
        with no_threads("short"), pytest.raises(NodeError, match="short of threads"):
            await in_thread(pool, done.append, 1)
        await in_thread(pool, done.append, 2)
    assert done == [2]


async def test_what_another_thread_has_taken_up_meanwhile_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be writing into memory that would be given back."""
    went, done = Event(), Event()

    def work() -> str:
        went.set()
        assert done.wait(20)
        return "done"

    with ThreadPoolExecutor(2, "short") as pool:
        adjust = pool._adjust_thread_count

        def late() -> None:
            adjust()
            assert went.wait(20)
            done.set()
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(pool, "_adjust_thread_count", late)
        assert await in_thread(pool, work) == "done"


async def test_errors_of_the_work_and_of_a_pool_that_is_closed_are_told_as_they_are() -> None:
    pool = ThreadPoolExecutor(1)
    with pytest.raises(ZeroDivisionError):
        await in_thread(pool, divmod, 1, 0)
    pool.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        await in_thread(pool, divmod, 1, 1)


async def test_whoever_waits_for_what_a_closed_pool_gives_back_undone_is_cancelled() -> None:
    pool, went, end = ThreadPoolExecutor(1), Event(), Event()

    def first() -> bool:
        went.set()
        return end.wait(20)

    running, waiting = (asyncio.create_task(in_thread(pool, call)) for call in (first, went.clear))
    while not went.is_set():  # noqa: ASYNC110 - a thread sets it
        await asyncio.sleep(0.001)
    pool.shutdown(wait=False, cancel_futures=True)
    end.set()
    ended = await asyncio.wait_for(asyncio.gather(running, waiting, return_exceptions=True), 20)
    assert ended[0] is True
    assert isinstance(ended[1], asyncio.CancelledError)
    assert went.is_set()
