"""Shared memory that is too small for the replicas is found before they start."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.replicas import shared_memory_check
from engine.replicas.launch import CPU_KV_BYTES, EngineSettings
from engine.replicas.shared_memory_check import (
    HostMemoryDirRefused,
    HostMemoryTooLarge,
    SharedMemoryTooSmall,
    check_host_memory,
    check_room,
    kv_bytes_each,
    safe_host_memory,
    shared_kv_bytes,
)
from engine.replicas.supervisor import Supervisor

CPU = EngineSettings("org/model", Path("/run/p"), Path("/dev/shm/p"), Path("/log/p"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory as a container has it by default: 64 MiB."""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_blocks=64 << 20 >> 12, f_frsize=1 << 12))


def test_replicas_that_do_not_fit_are_refused_with_what_to_change(small: None) -> None:
    with pytest.raises(SharedMemoryTooSmall, match=r"has 64 MiB, and the KV of 2 replicas takes 1024: .*SHM_SIZE"):
        check_room(CPU)


def test_replicas_that_fit_are_accepted(small: None) -> None:
    check_room(replace(CPU, vllm_args=("--kv-cache-memory-bytes", "32M")))
    with pytest.raises(SharedMemoryTooSmall):
        check_room(replace(CPU, vllm_args=("--kv-cache-memory-bytes", "32M"), replicas=3))


@pytest.mark.parametrize("change", [{"devices": ("0", "1")}, {"connector": False}, {"launcher": ("fake",)}])
def test_replicas_that_keep_no_kv_there_are_accepted(small: None, change: dict[str, object]) -> None:
    assert shared_kv_bytes(replace(CPU, **change)) == 0
    check_room(replace(CPU, **change))


async def test_a_supervisor_does_not_start_without_room(small: None) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own paths may be too long for sockets
        base = Path(folder)
        settings = EngineSettings("org/model", base / "run", base / "tables", base / "logs")
        with pytest.raises(SharedMemoryTooSmall):
            await Supervisor(settings).start()
        assert not (base / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ((), CPU_KV_BYTES),
        (("--kv-cache-memory-bytes", "1000"), 1000),
        (("--kv-cache-memory-bytes=1G",), 1 << 30),
        (("--kv_cache_memory_bytes", "1.5g"), 1_500_000_000),
        (("--kv-cache-memory-bytes", "1k", "--kv-cache-memory-bytes", "2k"), 2000),
        (("--kv-cache-memory-bytes", "plenty"), 0),
        (("--kv-cache-memory-bytes",), 0),
    ],
)
def test_the_last_size_that_vllm_is_given_counts(arguments: tuple[str, ...], size: int) -> None:
    assert kv_bytes_each(arguments) == size


def test_more_host_memory_than_is_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory_check, "free_bytes", lambda: 3 << 30)
    check_host_memory(replace(CPU, host_memory=3 << 30))
    with pytest.raises(HostMemoryTooLarge, match="asks for 4096 MiB, and 3072 MiB are free"):
        check_host_memory(replace(CPU, host_memory=4 << 30))


@pytest.mark.parametrize(("free", "safe"), [(44, 10 << 30), (1000, 64 << 30), (5, 256 << 20), (4.9, 0), (1, 0)])
def test_a_quarter_of_what_is_free_and_not_for_kv_is_safe(monkeypatch: pytest.MonkeyPatch, free: float, safe: int) -> None:
    monkeypatch.setattr(shared_memory_check, "free_bytes", lambda: int(free * (1 << 30)))
    assert safe_host_memory(replace(CPU, vllm_args=("--kv-cache-memory-bytes", "2G"))) == safe


def test_several_fleets_need_room_together(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    one = replace(CPU, replicas=1, vllm_args=("--kv-cache-memory-bytes", "30M"))
    check_room(one, one)
    with pytest.raises(SharedMemoryTooSmall, match="the KV of 3 replicas"):
        check_room(one, one, one)
    monkeypatch.setattr(shared_memory_check, "free_bytes", lambda: 3 << 30)
    with pytest.raises(HostMemoryTooLarge, match="asks for 4096 MiB"):
        check_host_memory(replace(CPU, host_memory=2 << 30), replace(CPU, host_memory=2 << 30))


def test_named_host_memory_takes_what_it_took_before_and_its_directory_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tmp_path / "files"
    asked = replace(CPU, table_dir=tmp_path / "tables", host_memory=4 << 20, host_memory_dir=files)
    monkeypatch.setattr(shared_memory_check, "free_bytes", lambda: 1 << 20)
    with pytest.raises(HostMemoryTooLarge, match="asks for 4 MiB, and 1 MiB are free"):
        check_host_memory(asked)
    (files / "replica-2.memory").write_bytes(bytes(3 << 20))  # of a start with more replicas: it stays
    with pytest.raises(HostMemoryTooLarge, match="asks for 4 MiB, and 1 MiB are free"):
        check_host_memory(asked)
    (files / "replica-0.memory").write_bytes(bytes(3 << 20))
    check_host_memory(asked)
    files.chmod(0o755)
    with pytest.raises(HostMemoryDirRefused, match=r"host_memory_dir .*/files: it must be a directory of yours"):
        check_host_memory(asked)
