"""`peerkv serve` killed while it serves keys with limits: budgets go on, and no reservation is left over."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from gateway.cli.main import main
from tests.unit.gateway.running_door import until
from tests.unit.gateway.serve.test_run import COMPLETION, Process, peerkv

START_SECONDS_MAX = 90.0
BUDGET = 1000
EACH = 5 + 3  # tokens of COMPLETION and of its answer, at the fake engine
AT_ONCE = 4


def posted(gateway: Process, key: str, **extra: Any) -> Any:
    headers = {"authorization": f"Bearer {key}"}
    return gateway.session.post(gateway.url + "/v1/completions", json=COMPLETION | extra, headers=headers)


async def use(gateway: Process) -> dict[str, Any]:
    _, stats = await gateway.get("/kv/stats")
    found: dict[str, Any] = stats["limits"][0]["keys"][0]
    return found


async def test_after_a_kill_the_budget_goes_on_and_no_reservation_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.upper().startswith("PEERKV_")]:
        monkeypatch.delenv(name)
    limits = ["--tokens-per-month", str(BUDGET), "--requests-in-flight-max", str(AT_ONCE)]
    assert main(["keys", "add", "alice", *limits, "--keys-file", str(tmp_path / "keys.toml")]) == 0
    key = capsys.readouterr().out.strip()
    env = {
        "PEERKV_KEYS_FILE": str(tmp_path / "keys.toml"),
        "PEERKV_LIMITS_FILE": str(tmp_path / "limits.json"),
        "PEERKV_GENERATED_TOKEN_PRICE": "1",
    }

    def written() -> int:
        try:
            spent: int = json.loads((tmp_path / "limits.json").read_text())["keys"]["alice"]["month"]["spent"]
        except (OSError, KeyError):
            return 0
        return spent

    async with peerkv(tmp_path, **env) as gateway:
        await gateway.ready(seconds=START_SECONDS_MAX)
        for _ in range(10):
            async with posted(gateway, key) as answer:
                assert answer.status == 200
                await answer.read()
        await until(lambda: written() == 10 * EACH)
        endless = [
            await posted(gateway, key, stream=True, max_tokens=200, fake={"token_delay": 0.1}).__aenter__()
            for _ in range(AT_ONCE)
        ]
        shown = await use(gateway)
        assert shown["requests_in_flight"] == AT_ONCE
        assert shown["limits"]["tokens_per_month"]["used"] >= 10 * EACH + AT_ONCE * 200
        async with posted(gateway, key) as answer:
            assert answer.status == 429
        gateway.signal(signal.SIGKILL)
        await gateway.process.wait()
        for answer in endless:
            answer.close()
    async with peerkv(tmp_path, **env) as gateway:
        await gateway.ready(seconds=START_SECONDS_MAX)
        shown = await use(gateway)
        assert shown["requests_in_flight"] == 0
        assert shown["limits"]["tokens_per_month"]["used"] == 10 * EACH
        statuses = [asyncio.create_task(_status(gateway, key)) for _ in range(AT_ONCE)]
        assert [await each for each in statuses] == [200] * AT_ONCE
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
        assert written() == (10 + AT_ONCE) * EACH


async def _status(gateway: Process, key: str) -> int:
    async with posted(gateway, key) as answer:
        await answer.read()
        status: int = answer.status
        return status
