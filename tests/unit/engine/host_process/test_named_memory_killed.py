"""Who creates host memory in named files is killed after each step of it: the next start is right, hangs nowhere and takes no
more memory than the first would have."""

import os
import signal
from contextlib import closing
from multiprocessing import get_context

import pytest

from engine.host_process import named_memory
from engine.host_process.named_memory import named_bytes
from tests.unit.engine.host_process.test_named_memory import KEYS, NAME, SIZE, Start
from transport.backends.shared_memory import map_region
from transport.table import liveness

STEPS = ("mkdir", "open", "ftruncate", "pwrite", "posix_fallocate", "link", "rename", "replace", "unlink")
STEPS_MAX = 60
SECONDS_MAX = 60


def create(place, number, killed_after, conn):
    """One start, killed after so many of its steps; it tells the name of each."""
    done = 0

    def counted(name, step):
        def stepping(*args, **about):
            nonlocal done
            found = step(*args, **about)
            done += 1
            conn.send(name)
            if done == killed_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return stepping

    liveness.claim = counted("claim", liveness.claim)
    for name in STEPS:
        setattr(os, name, counted(name, getattr(os, name)))
    start = Start(place, number)
    start.store()
    conn.send("stored")
    os.kill(os.getpid(), signal.SIGKILL)


def killed(place, number, after):
    """Return the steps that a start did before it was killed."""
    context = get_context("fork")  # quick: there is one for each step
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=create, args=(place, number, after, theirs))
    child.start()
    theirs.close()
    steps = []
    try:
        while True:
            assert ours.poll(SECONDS_MAX), f"it hangs after {steps}"
            steps.append(ours.recv())
    except EOFError:
        pass
    child.join(SECONDS_MAX)
    assert child.exitcode == -signal.SIGKILL
    return steps


def right_afterwards(place, number, taken, *, may_hold=False):
    """A start behind the killed one stores, and so does the next find it."""
    again = Start(place, number)
    with closing(map_region(again.kept.region)) as memory:
        assert not again.held() or (may_hold and memory[:5] == b"block")
    if not again.held():
        again.store()
    files = sorted(path.name for path in (place / "files").iterdir())
    assert files == [f"{NAME}.{what}" for what in ("lock", "memory", "table")]
    assert os.stat(place / "files" / f"{NAME}.memory").st_size == SIZE
    assert named_bytes(place / "files", [NAME]) == taken
    again.end()
    last = Start(place, number + 1)
    assert last.held()
    with closing(map_region(last.kept.region)) as memory:
        assert memory[:5] == b"block"
    last.end()


@pytest.fixture
def taken(tmp_path):
    """The bytes that a start takes which nothing happens to."""
    (tmp_path / "whole").mkdir()
    start = Start(tmp_path / "whole", 0)
    start.store()
    found = named_bytes(tmp_path / "whole" / "files", [NAME])
    start.end()
    return found


def test_whichever_step_of_creating_it_was_the_last_the_next_start_is_right(tmp_path, taken):
    seen, before = set(), len(os.listdir("/proc/self/fd"))
    for after in range(1, STEPS_MAX):
        place = tmp_path / str(after)
        place.mkdir()
        steps = killed(place, 1, after)
        right_afterwards(place, 2, taken, may_hold=steps[-1] == "stored")
        seen.update(steps)
        if steps[-1] == "stored":
            break
    assert steps[-1] == "stored", "there are more steps"
    assert {"open", "claim", "ftruncate", "pwrite", "posix_fallocate"} <= seen
    assert {"link", "rename", "replace"} & seen
    assert len(os.listdir("/proc/self/fd")) == before


def test_whichever_step_of_making_it_anew_after_a_start_of_the_machine_was_the_last_nothing_old_is_believed(
    tmp_path, taken, monkeypatch
):
    boot = tmp_path / "boot"
    for after in range(1, STEPS_MAX):
        place = tmp_path / str(after)
        place.mkdir()
        boot.write_text("first")
        monkeypatch.setattr(named_memory, "BOOT_ID", boot)
        start = Start(place, 1)
        start.table.publish([0], KEYS[1:2])
        start.store()
        start.end()
        boot.write_text("another")
        steps = killed(place, 2, after)
        right_afterwards(place, 3, taken, may_hold=steps[-1] == "stored")
        if steps[-1] == "stored":
            break
    assert steps[-1] == "stored", "there are more steps"
