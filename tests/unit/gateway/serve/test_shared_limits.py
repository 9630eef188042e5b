"""`peerkv serve` with a Valkey server of shared limits: used from the first request on, shown, and told at the end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from gateway.cli.main import main
from gateway.limits.shared.commands import Sender, understood
from tests.unit.engine.frame_tiers.vault_servers import valkey
from tests.unit.gateway.limits.shared.wires import Server
from tests.unit.gateway.serve.test_limits_survive import EACH, START_SECONDS_MAX, posted
from tests.unit.gateway.serve.test_run import peerkv


async def test_limits_are_counted_at_the_server_that_the_settings_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.upper().startswith("PEERKV_")]:
        monkeypatch.delenv(name)
    assert main(["keys", "add", "alice", "--tokens-per-month", "10000", "--keys-file", str(tmp_path / "keys.toml")]) == 0
    key = capsys.readouterr().out.strip()
    with valkey(tmp_path) as server:
        (tmp_path / "password").write_text(server.address.password or "")
        env = {
            "PEERKV_KEYS_FILE": str(tmp_path / "keys.toml"),
            "PEERKV_LIMITS_VALKEY": f"valkey://127.0.0.1:{server.address.port}",
            "PEERKV_LIMITS_VALKEY_PASSWORD_FILE": str(tmp_path / "password"),
        }
        async with peerkv(tmp_path, **env) as gateway:
            await gateway.ready(seconds=START_SECONDS_MAX)
            for _ in range(3):
                async with posted(gateway, key) as answer:
                    assert answer.status == 200
                    await answer.read()
            _, stats = await gateway.get("/kv/stats")
            assert (stats["shared_limits"]["up"], stats["shared_limits"]["alone_requests"]) == (1, 0)
            assert stats["limits"][0]["keys"][0]["limits"]["tokens_per_month"]["used"] == 3 * EACH
            async with gateway.session.get(gateway.url + "/metrics") as answer:
                text = await answer.text()
            assert "\npeerkv_shared_limits_up 1.0\n" in text
            assert "\npeerkv_shared_limits_alone_requests_total 0.0\n" in text
            async with gateway.session.get(gateway.url + "/ready") as answer:  # tests' server is a vault's
                assert "may forget what was used of limits" in (await answer.text())
            gateway.signal(signal.SIGTERM)
            assert await gateway.ended() == 0
        raw = Server(server.address)
        told = understood(raw.run(Sender(b"a-test", 1).hold("alice", [])))
        raw.close()
    assert told is not None
    assert (told.account.state.month.spent, told.account.running) == (3 * EACH, 0)
