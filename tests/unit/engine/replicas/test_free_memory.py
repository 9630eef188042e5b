"""Free memory is what the machine has, or what the tightest control group leaves, of either version of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.replicas.free_memory import free_bytes

GIB = 1 << 30


class Machine:
    """8 GiB available, and control groups in a folder."""

    def __init__(self, place: Path) -> None:
        self._place = place
        (place / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n")

    def within(self, *lines: str) -> None:
        """What /proc/self/cgroup says."""
        (self._place / "own").write_text("".join(f"{line}\n" for line in lines))

    def group(self, path: str, **files: object) -> None:
        folder = self._place / "groups" / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / f"memory.{name}").write_text(f"{content}\n")

    def free(self) -> int:
        return free_bytes(self._place / "meminfo", self._place / "own", self._place / "groups")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("most", "used", "cached", "free"),
    [
        ("max", "5", "0", 8 << 30),
        ("1073741824", "73741824", "0", 1_000_000_000),
        ("1073741824", "1073741824", "1000000000", 1_000_000_000),
        ("5", "9", "0", 0),
        (None, None, "0", 8 << 30),
    ],
)
def test_free_memory_is_the_machines_or_what_the_control_group_leaves(
    tmp_path: Path, most: str | None, used: str | None, cached: str, free: int
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n")
    if most is not None and used is not None:
        (tmp_path / "memory.max").write_text(most + "\n")
        (tmp_path / "memory.current").write_text(used + "\n")
        (tmp_path / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\nactive_file 3\n")
    assert free_bytes(tmp_path / "meminfo", tmp_path / "none", tmp_path) == free


V1 = "4:cpu,memory:/docker/a"


def test_version_1_limits_a_group_too(machine: Machine) -> None:
    machine.within("9:name=systemd:/", V1, "0::/")
    stat = "inactive_file 0\ntotal_inactive_file 1024"
    machine.group("memory/docker/a", limit_in_bytes=3 * GIB, usage_in_bytes=GIB, stat=stat)
    assert machine.free() == 2 * GIB + 1024
    machine.group("memory", limit_in_bytes=9223372036854771712, usage_in_bytes=6 * GIB, stat=stat)
    assert machine.free() == 2 * GIB + 1024
    machine.group("memory/docker", limit_in_bytes=2 * GIB, usage_in_bytes=GIB, stat=stat)
    assert machine.free() == GIB + 1024


def test_in_a_container_of_version_1_the_mount_is_the_group(machine: Machine) -> None:
    machine.within(V1)
    machine.group("memory", limit_in_bytes=GIB, usage_in_bytes=0, stat="")
    assert machine.free() == GIB


def test_of_nested_groups_the_one_with_the_least_left_counts(machine: Machine) -> None:
    machine.within("0::/user.slice/peerkv.service")
    machine.group("user.slice/peerkv.service", max=6 * GIB, current=GIB, stat="inactive_file 0")
    assert machine.free() == 5 * GIB
    machine.group("user.slice", max=7 * GIB, current=3 * GIB, stat="inactive_file 0")
    assert machine.free() == 4 * GIB
    machine.group("user.slice/peerkv.service", max="max")
    machine.group("", max=5 * GIB, current=3 * GIB, stat="inactive_file 0")
    assert machine.free() == 2 * GIB
    machine.group("other.slice", max=1, current=1)
    assert machine.free() == 2 * GIB


def test_memory_above_high_is_not_free(machine: Machine) -> None:
    machine.within("0::/")
    machine.group("", max="max", high=3 * GIB, current=GIB, stat="inactive_file 0")
    assert machine.free() == 2 * GIB
    machine.group("", max=2 * GIB)
    assert machine.free() == GIB


@pytest.mark.parametrize("missing", ["stat", "current", "high"])
def test_a_limit_that_was_found_counts_whatever_cannot_be_read_beside_it(
    machine: Machine, tmp_path: Path, missing: str
) -> None:
    machine.within("0::/")
    machine.group("", max=2 * GIB, high="max", current=GIB, stat="inactive_file 0")
    (tmp_path / "groups" / f"memory.{missing}").unlink()
    assert machine.free() == (2 * GIB if missing == "current" else GIB)
    (tmp_path / "groups" / f"memory.{missing}").write_bytes(b"\xff\xfe")
    assert machine.free() == (2 * GIB if missing == "current" else GIB)


def test_a_path_out_of_the_groups_that_are_seen_leads_to_the_mount(machine: Machine) -> None:
    machine.within("0::/../../other")
    machine.group("", max=GIB, current=0)
    assert machine.free() == GIB
