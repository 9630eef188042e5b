"""Work in other threads of the agent. Where they are short it is not done, and it is not done later either."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from transport.errors import is_shortage
from transport.node.messages import NodeError

_Result = TypeVar("_Result")
_Given = ParamSpec("_Given")


async def in_thread(
    pool: ThreadPoolExecutor | None, call: Callable[_Given, _Result], *args: _Given.args, **given: _Given.kwargs
) -> _Result:
    """Return what `call` returns in a thread of `pool`, None for the event loop's own. Once begun it goes on to its end.

    Raises NodeError if no thread can be started: then it has not been called, and never will be. Cancelled likewise if the
    pool is closed with what waits in it.
    """
    ended: Future[_Result] = Future()

    def work() -> None:
        if not ended.set_running_or_notify_cancel():
            return
        try:
            ended.set_result(call(*args, **given))
        except BaseException as error:  # noqa: BLE001 - for whoever waits, as a pool has it
            ended.set_exception(error)

    try:
        handed = asyncio.get_running_loop().run_in_executor(pool, work)
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        if ended.cancel():  # a pool keeps what it found no thread for, and hands it to one that it has, now or later
            raise NodeError(f"this node is short of threads: {error}") from error
    else:
        handed.add_done_callback(lambda _: ended.cancel())  # of what a pool gave back undone, that is
    return await asyncio.wrap_future(ended)
