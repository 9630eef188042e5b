"""What is known of the fleets before anything starts: what cannot be is refused, what is less than was wanted is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.host_process.kept_memory import KeptMemories
from engine.replicas import shared_memory_check
from engine.replicas.launch import LaunchRefused
from engine.replicas.shared_memory_check import HostMemoryDirRefused
from gateway.serve import run
from gateway.settings import Settings, load


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Settings of a fleet on the CPU, whose model is there."""

    async def present(settings: Settings) -> Settings:
        return settings

    monkeypatch.setattr(run, "with_model", present)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return {"run_dir": tmp_path / "run", "table_dir": tmp_path / "tables"}


async def test_loss_that_memory_is_too_short_for_is_a_warning_unless_there_is_to_be_no_host_memory(
    given: dict[str, object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shared_memory_check, "free_bytes", lambda: 1 << 20)
    (fleet,) = await run._wanted_fleets(load(given | {"lossy": "int8"}))
    assert fleet.engine.host_memory == 0
    assert "warning: lossy: memory is short" in capsys.readouterr().err
    with pytest.raises(LaunchRefused, match=r"^lossy: there is nothing that keeps blocks with loss"):
        await run._wanted_fleets(load(given | {"lossy": "int8", "host_memory": "0"}))


async def test_files_of_host_memory_that_another_peerkv_uses_are_refused_before_anything_starts(
    given: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory_check, "free_bytes", lambda: 1 << 30)
    files = tmp_path / "files"
    (tmp_path / "others").mkdir()
    other = KeptMemories(tmp_path / "others")
    other.keep("replica-1", 1 << 16, files)
    given |= {"host_memory": "1MiB", "host_memory_dir": files, "replicas": 2, "claim_seconds_max": 0.1}
    with pytest.raises(HostMemoryDirRefused, match=rf"{files}: another peerkv keeps host memory of replica-1 there: stop it"):
        await run._wanted_fleets(load(given))
    await run._wanted_fleets(load(given | {"replicas": 1}))
    other.keep("replica-0", 1 << 16, files)
    with pytest.raises(HostMemoryDirRefused, match="of replica-0 there"):
        await run._wanted_fleets(load(given | {"replicas": 1}))
