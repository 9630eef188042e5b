"""What the doctor says of the files that keep keys, and what was used of their limits."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic import SecretStr

from gateway.cli.doctor import machine
from gateway.cli.doctor.findings import judge
from gateway.errors import SettingsError
from gateway.settings import Settings
from tests.unit.gateway.cli.test_doctor import CPU_MACHINE, Ready, settings_for
from tests.unit.gateway.http_server.test_tls import SecureDoor
from tests.unit.gateway.running_door import running_door


def test_a_keys_file_that_others_may_read_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("")
    path.chmod(0o640)
    assert machine.look(Settings(keys_file=path)).keys_file_open == str(path)
    path.chmod(0o600)
    assert machine.look(Settings(keys_file=path)).keys_file_open == ""
    [problem] = [each for each in judge(replace(CPU_MACHINE, keys_file_open="/k.toml"), None, ()) if "/k.toml" in each.what]
    assert problem.problem
    assert problem.remedy == "chmod 600 /k.toml"


def test_a_limits_file_that_could_not_be_written_is_a_problem_where_there_are_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked)
    settings = Settings(limits_file=locked / "limits.json")
    assert machine.look(settings).unwritable == ()
    with_keys = settings.model_copy(update={"keys_file": tmp_path / "keys.toml"})
    assert machine.look(with_keys).unwritable == (("limits_file", str(locked)),)


class Guarded(Ready):
    """With an admin key, where `status` is 401."""

    status = 401

    def do_GET(self) -> None:
        if self.path != "/kv/stats":
            super().do_GET()
            return
        self.send_response(self.status)
        self.end_headers()


class Unguarded(Guarded):
    status = 200


@pytest.mark.parametrize(("serving", "key_of_this_shell"), [(Guarded, None), (Unguarded, "of-another-gateway")])
def test_the_gateway_itself_is_asked_whether_it_has_an_admin_key(
    serving: type[Guarded], key_of_this_shell: str | None, tmp_path: Path
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), serving) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        settings = settings_for(tmp_path, server.server_port)
        key = SecretStr(key_of_this_shell) if key_of_this_shell else None
        found = machine.look(settings.model_copy(update={"admin_key": key}))
        server.shutdown()
        thread.join()
    assert (found.gateway_answers, found.admin_key) == (True, serving is Guarded)
    notes = [each.what for each in judge(found, None, ()) if "no admin key is set" in each.what]
    assert len(notes) == (serving is Unguarded)


async def test_a_gateway_is_asked_with_the_admin_key_and_the_certificate_that_are_given(tmp_path: Path) -> None:
    async with running_door(tmp_path, admin_key="the-admin-key") as door, SecureDoor(door, tmp_path) as secure:

        async def refused(key: str | None, cacert: Path | None) -> str:
            given = {"admin_key": SecretStr(key) if key else None}
            found = await asyncio.to_thread(machine.look, settings_for(tmp_path, secure.port).model_copy(update=given), cacert)
            assert (found.gateway_answers, found.admin_key) == (True, True)
            return found.gateway_refuses

        assert await refused("the-admin-kez", secure.cert) == "the gateway refuses this admin key"
        for key, cacert in (("the-admin-key", secure.cert), (None, secure.cert), (None, None)):
            assert await refused(key, cacert) == ""
        assert f"the certificate of {secure.url} is not trusted" in await refused("the-admin-key", None)
        with pytest.raises(SettingsError, match="cannot check"):
            await refused(None, tmp_path / "nothing")


def test_what_a_gateway_refuses_is_noted_with_what_to_do() -> None:
    for refused, remedy in (
        ("the gateway refuses this admin key", "--admin-key"),
        ("it is not trusted; --cacert FILE", "--cacert"),
    ):
        [note] = [each for each in judge(replace(CPU_MACHINE, gateway_refuses=refused), None, ()) if each.what in refused]
        assert not note.problem
        assert remedy in note.remedy
