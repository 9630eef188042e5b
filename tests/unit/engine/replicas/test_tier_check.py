"""A disk that cannot be had, and loss that nothing keeps, are found before anything starts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from engine.replicas import tier_check
from engine.replicas.launch import EngineSettings, LaunchRefused
from engine.replicas.tier_check import check_tiers, loss_without_room

CPU = EngineSettings("org/model", Path("/run/p"), Path("/dev/shm/p"), Path("/log/p"))


def test_a_disk_below_a_file_is_refused_and_one_that_can_be_made_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for disk in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(LaunchRefused, match=rf"^disk: {disk} cannot be used: {tmp_path}/file is no directory$"):
            check_tiers(CPU, replace(CPU, disk=disk))
        check_tiers(replace(CPU, disk=disk, connector=False))
    check_tiers(replace(CPU, disk=tmp_path), replace(CPU, disk=tmp_path / "a" / "b"))
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchRefused, match="/proc cannot be written to"):  # although root may, by its mode
        check_tiers(replace(CPU, disk=Path("/proc/x")))

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(LaunchRefused, match=rf"{tmp_path} cannot be written to \(Permission denied\)"):
        check_tiers(replace(CPU, disk=tmp_path / "a"))


def test_files_of_host_memory_need_host_memory(tmp_path: Path) -> None:
    named = replace(CPU, host_memory_dir=tmp_path)
    with pytest.raises(LaunchRefused, match="host_memory_dir: there is no host memory to keep in it"):
        check_tiers(named)
    check_tiers(replace(named, host_memory=1 << 30))
    check_tiers(replace(named, disk=tmp_path))  # below which there is some


def test_loss_needs_what_keeps_it_of_one_of_the_models(tmp_path: Path) -> None:
    lossy = replace(CPU, lossy="int8")
    with pytest.raises(LaunchRefused, match=r"^lossy: .* give disk, vault or host_memory$"):
        check_tiers(lossy, lossy)
    check_tiers(CPU, replace(lossy, host_memory=1 << 20))
    check_tiers(replace(CPU, lossy="rot4", host_memory=1 << 20))
    for codec in ("int8", "rot4", "rot3"):
        check_tiers(replace(CPU, lossy=codec, devices=("0",), host_memory=1 << 20))
    check_tiers(lossy, replace(lossy, disk=tmp_path))
    check_tiers(replace(lossy, vault="valkey://h"))
    check_tiers(CPU)


def test_loss_that_memory_turns_out_too_short_for_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_check, "free_bytes", lambda: 500 << 20)
    lossy = replace(CPU, lossy="int8")
    check_tiers(lossy, sized_later=True)
    assert loss_without_room(CPU, lossy).startswith("lossy: memory is short (500 MiB are free), so there is no host memory")
    assert loss_without_room(CPU) == loss_without_room(replace(lossy, host_memory=1 << 20)) == ""
    assert loss_without_room(replace(lossy, vault="valkey://h")) == ""
