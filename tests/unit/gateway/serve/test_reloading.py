"""SIGHUP: settings that are read again while clients send."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from gateway.errors import SettingsError
from gateway.serve.reloading import RELOADED, Reloading
from gateway.settings import Settings
from tests.unit.gateway.running_door import until
from tests.unit.gateway.serve.test_keys_under_load import START_SECONDS_MAX, status_of
from tests.unit.gateway.serve.test_run import Process, peerkv

CLIENTS = 8
CONFIG = """
retry_attempts_max = {retries}
replicas_per_gpu = {share}
[[tenants]]
name = "one"
api_key = "{key}"
"""


def says(gateway: Process, words: str) -> bool:
    return any(words in line for line in gateway.err)


async def test_settings_and_keys_change_under_load_and_no_request_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "peerkv.toml"
    path.write_text(CONFIG.format(retries=2, share=1, key="the-first-key"))
    async with peerkv(tmp_path, PEERKV_CONFIG=str(path)) as gateway:
        await gateway.ready(seconds=START_SECONDS_MAX)
        statuses: list[int] = []
        done = False

        async def client() -> None:
            while not done:
                statuses.append(await status_of(gateway, "the-first-key"))

        clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
        path.write_text("retry_attempts_max = 'many'")
        gateway.signal(signal.SIGHUP)
        await until(lambda: says(gateway, "the settings stay as they are: ") and says(gateway, "retry_attempts_max"))
        both = (
            CONFIG.format(retries=1, share=2, key="the-first-key") + '[[tenants]]\nname = "two"\napi_key = "the-second-key"\n'
        )
        path.write_text(both)
        assert await status_of(gateway, "the-second-key") == 401
        gateway.signal(signal.SIGHUP)
        await until(lambda: says(gateway, "changed from now on: retry_attempts_max, tenants"))
        await until(lambda: says(gateway, "changed by a restart alone: replicas_per_gpu"))
        assert await status_of(gateway, "the-second-key") == 200
        done = True
        await asyncio.gather(*clients)
        assert len(statuses) >= CLIENTS
        assert set(statuses) == {200}
        assert not says(gateway, "the-second-key")  # a value may be a secret
        path.write_text(CONFIG.format(retries=1, share=2, key="the-third-key"))
        gateway.signal(signal.SIGHUP)

        async def revoked() -> bool:
            return await status_of(gateway, "the-first-key") == 401

        await until(revoked)
        assert await status_of(gateway, "the-third-key") == 200


def test_what_takes_effect_is_told_and_the_rest_is_kept_for_a_restart(capsys: pytest.CaptureFixture[str]) -> None:
    found = Settings(port=8000)
    taken: list[Settings] = []
    reloading = Reloading(Settings(port=8000), lambda: found, taken.append)
    reloading()
    assert (taken, "no setting was changed" in capsys.readouterr().err) == ([], True)
    found = Settings(port=9000, drain_seconds=7.0)
    reloading()
    assert [(each.drain_seconds, each.port) for each in taken] == [(7.0, 8000)]
    assert (reloading.settings.drain_seconds, reloading.settings.port) == (7.0, 8000)
    told = capsys.readouterr().err
    assert "changed from now on: drain_seconds" in told
    assert "port" in told.partition("changed by a restart alone: ")[2]


def test_settings_that_are_wrong_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Settings:
        raise SettingsError("port: not a number")

    taken: list[Settings] = []
    Reloading(Settings(), broken, taken.append)()
    assert taken == []
    assert "the settings stay as they are: port: not a number" in capsys.readouterr().err


def test_settings_that_cannot_be_taken_over_are_told_of_and_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    trouble = [SettingsError("salt_secret_file: it has to hold 16 bytes")]
    taken: list[Settings] = []

    def use(settings: Settings) -> None:
        if trouble:
            raise trouble.pop()
        taken.append(settings)

    reloading = Reloading(Settings(), lambda: Settings(drain_seconds=7.0), use)
    reloading()
    assert reloading.settings.drain_seconds != 7.0
    assert "the settings stay as they are: salt_secret_file" in capsys.readouterr().err
    reloading()
    assert [each.drain_seconds for each in taken] == [reloading.settings.drain_seconds] == [7.0]


@pytest.mark.parametrize("name", ["admin_key", "tenants"])
def test_a_file_without_the_keys_of_before_lets_nobody_in(capsys: pytest.CaptureFixture[str], name: str) -> None:
    keys = {"admin_key": "an-admin-key", "tenants": [{"name": "one", "api_key": "the-first-key"}]}
    taken: list[Settings] = []
    reloading = Reloading(Settings(**{name: keys[name]}), lambda: Settings(drain_seconds=7.0), taken.append)
    reloading()
    assert taken == []
    assert reloading.settings.drain_seconds != 7.0
    assert f"the settings stay as they are: without {name}" in capsys.readouterr().err


def test_every_setting_that_takes_effect_exists() -> None:
    assert set(Settings.model_fields) >= RELOADED
