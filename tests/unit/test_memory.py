"""What the process keeps of freed memory, and what the garbage collector is spared."""

import subprocess
import sys

import pytest

# Page faults while blocks of a body's size are allocated, touched and freed, after what argv says was done.
_PROGRAM = """
import platform, resource, sys
from gateway import memory
if platform.libc_ver()[0] != "glibc":
    print(-1)
    raise SystemExit
if sys.argv[1] == "settled":
    memory.settle_memory()
def touch():
    kept = [bytes(300_000) for _ in range(4)]
    return [b"".join(kept[:2]), len(kept)]
for _ in range(20):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    found = subprocess.run([sys.executable, "-c", _PROGRAM, how], capture_output=True, text=True, timeout=60, check=True)
    return int(found.stdout)


def test_the_memory_of_a_large_body_is_used_again_without_a_page_fault() -> None:
    settled = faults("settled")
    if settled < 0:
        pytest.skip("malloc is not glibc's")
    assert settled < 100
    assert faults("as it is") > 10 * max(settled, 10)


def test_what_there_is_at_the_start_is_not_looked_at_again() -> None:
    program = "import gc; from gateway import memory; memory.settle_memory(); print(gc.get_freeze_count(), *gc.get_threshold())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    frozen, *thresholds = map(int, found.stdout.split())
    assert frozen > 1000
    assert thresholds[0] > 700
