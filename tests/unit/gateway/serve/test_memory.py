"""What the garbage collector is spared, and which memory gets huge pages."""

import subprocess
import sys

from gateway.serve import memory


def test_what_there_is_at_the_start_is_not_looked_at_again() -> None:
    settle = "import gc; from gateway.serve import memory; memory.settle_memory()"
    program = f"{settle}; print(gc.get_freeze_count(), *gc.get_threshold())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    frozen, *thresholds = map(int, found.stdout.split())
    assert frozen > 1000
    assert thresholds[0] > 700


_MAPS = b"""\
55d0c0000000-55d0c0001000 r-xp 00000000 fe:01 1234                       /usr/bin/python3.11
55d0c0ff0000-55d0c1ff0000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000400000 rw-p 00000000 00:00 0 
7f0000500000-7f0000700000 rw-p 00000000 00:00 0 
7f0001000000-7f0001400000 rw-s 00000000 00:01 99                         /dev/shm/a table (deleted)
7f0002000000-7f0002400000 r--p 00000000 00:00 0 
7f0003000000-7f0003400000 rw-p 00000000 fe:01 99                         /jos\xe9\x0cs \xe2\x80\xa8 table
7ffc00000000-7ffc00400000 rw-p 00000000 00:00 0                          [stack]
"""  # noqa: W291  as the kernel writes it


def test_huge_pages_are_for_whole_places_of_private_memory_without_a_file() -> None:
    found = list(memory.huge_places(_MAPS))
    assert found == [(0x55D0C1000000, 0x55D0C1E00000), (0x7F0000000000, 0x7F0000400000)]


def test_what_there_is_when_memory_settles_is_in_huge_pages_or_where_it_was() -> None:
    program = (
        "kept = [b'%d' % number for number in range(200_000)]; from gateway.serve import memory; memory.settle_memory(); "
        "print(kept == [b'%d' % number for number in range(200_000)])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "True\n"
