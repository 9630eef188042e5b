"""A block whose entry changed between look-up and check is not used.

The owner is the test: when the importer opens its memory, it withdraws the blocks and overwrites them, as a replica does
that gives them to another request.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import closing

from tests.real.owner import OwnMemory, held, keys_of, table_like, wait_readable

LENGTH = 1500  # long enough that the copy takes longer than a thread needs to wake up
WHOLE = (LENGTH - 1) // 32 * 32
SHORT = 500
NAME = "replica-y"
ATTEMPTS_MAX = 30
CAUGHT_MIN = 3


@contextlib.contextmanager
def owner(fleet, ids, salt) -> Iterator[tuple]:
    """A table and memory of our own with all blocks of a prompt that replica-0 holds."""
    with closing(fleet.table("replica-0")) as like:
        memory = OwnMemory(like, held(like, ids, salt))
        with table_like(fleet.table_dir, NAME, like, blocks=memory.blocks, memories=(memory.memory,)) as table:
            table.publish(range(memory.blocks), keys_of(like, ids, salt))
            try:
                yield table, memory
            finally:
                memory.close()


def ask(fleet, ids, salt):
    fleet.forget("replica-1")
    with fleet.counting("replica-1") as counted:
        hint = {"peerkv": {"source": NAME}}
        answer = fleet.direct("replica-1", ids, cache_salt=salt, kv_transfer_params=hint)
    return answer, counted


@contextlib.contextmanager
def one_core_for(fleet, replica: str) -> Iterator[None]:
    """Keep the importer's engine on one core, so that the changing thread finds the other one free."""
    with closing(fleet.table(replica)) as table:
        pid = table.description.pid
    cores = os.sched_getaffinity(pid)
    os.sched_setaffinity(pid, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(pid, cores)


def withdraw_when_opened(table, memory, watch: int, stop: int) -> None:
    if watch in wait_readable([watch, stop]):
        table.invalidate(range(memory.blocks))
        memory.scramble()


def test_blocks_that_stay_are_imported_and_overwritten_ones_would_show(fleet, words, salt):
    """The controls: our own memory is imported from, and what it holds decides the answer."""
    ids = words.ids(LENGTH)
    wanted = fleet.answer(ids, replica="replica-0")
    with owner(fleet, ids, salt) as (_, memory):
        answer, counted = ask(fleet, ids, salt)
        assert (counted.peer, counted.counts["fallbacks"]) == (WHOLE, 0)
        assert answer.close_to(wanted)
        memory.scramble()  # an owner that lies: its table still vouches for the blocks
        answer, counted = ask(fleet, ids, salt)
        assert counted.peer == WHOLE
        assert not answer.close_to(wanted)
    fleet.forget("replica-1")


def test_blocks_that_change_under_the_copy_are_computed_instead(fleet, words, salt):
    ids = words.ids(LENGTH)
    wanted = fleet.answer(ids, replica="replica-0")
    caught = 0
    for _ in range(ATTEMPTS_MAX):
        stop, tell = os.pipe()
        with owner(fleet, ids, salt) as (table, memory):
            watch = memory.watch()
            thread = threading.Thread(target=withdraw_when_opened, args=(table, memory, watch, stop))
            thread.start()
            try:
                with one_core_for(fleet, "replica-1"):
                    answer, counted = ask(fleet, ids, salt)
            finally:
                os.close(tell)
                thread.join()
                os.close(watch)
                os.close(stop)
        assert answer.close_to(wanted)
        assert counted.peer + counted.computed == LENGTH
        failed, fell_back = counted.counts["check_failures"], counted.counts["fallbacks"]
        assert (failed > 0) == (fell_back > 0) == (counted.peer < WHOLE)
        caught += fell_back
        if caught == CAUGHT_MIN:
            return
    raise AssertionError(f"only {caught} imports of {ATTEMPTS_MAX} were caught by a change")


def test_an_owner_that_never_stops_changing_its_blocks_harms_nobody(fleet, words, salt):
    """Blocks are withdrawn, overwritten, restored and offered again, over and over, while replica-1 imports."""
    ids = words.ids(SHORT)
    wanted = fleet.answer(ids, replica="replica-0")
    stop = threading.Event()
    with owner(fleet, ids, salt) as (table, memory), closing(fleet.table("replica-0")) as like:
        keys, true = keys_of(like, ids, salt), memory.content()

        def churn() -> None:
            while not stop.wait(0.004):
                table.invalidate(range(memory.blocks))
                memory.scramble()
                memory.restore(true)
                table.publish(range(memory.blocks), keys)

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for _ in range(8):
                answer, counted = ask(fleet, ids, salt)
                assert answer.close_to(wanted)
                assert counted.peer + counted.computed == SHORT
        finally:
            stop.set()
            thread.join()
