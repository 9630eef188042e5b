"""`peerkv serve` with a vault that does not let it in: said in `/ready` and, once, in the log; requests are served."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.unit.engine.frame_tiers.vault_servers import valkey
from tests.unit.gateway.running_door import until
from tests.unit.gateway.serve.test_run import Process, peerkv


async def warnings(gateway: Process) -> list[str]:
    """What `/ready` says of the tiers; the fake engines share no KV, which it says too."""
    _, body = await gateway.get("/ready")
    return [] if body is None else [each for each in body["warnings"] if each.startswith(("the disk", "the vault"))]


def said(gateway: Process) -> list[str]:
    return [line for line in gateway.err if "peerkv.tiers" in line]


async def test_a_wrong_password_of_the_vault_is_in_ready_and_once_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not it")
    with valkey(tmp_path) as server:
        where = ("--vault", f"valkey://127.0.0.1:{server.address.port}", "--vault-password-file", str(tmp_path / "secret"))
        async with peerkv(tmp_path, *where) as gateway:
            await gateway.ready()
            (warning,) = await until(lambda: warnings(gateway), 60.0)
            assert "WRONGPASS" in warning
            assert "--vault-password-file" in warning
            (line,) = await until(lambda: said(gateway))
            assert "WARNING" in line
            assert warning in line
            assert (await gateway.complete())[0] == 200
            gateway.signal(signal.SIGTERM)
            assert await gateway.ended() == 0
        assert said(gateway) == [line]


async def test_without_disk_and_vault_there_is_nothing_to_warn_of(tmp_path: Path) -> None:
    async with peerkv(tmp_path) as gateway:
        await gateway.ready()
        assert await warnings(gateway) == []
