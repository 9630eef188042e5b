"""The commands in the banner of a gateway that speaks HTTPS, pasted; and what commands say of a certificate or a scheme."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path

import pytest

from engine.fleet import FleetSnapshot, Replica, ReplicaState
from engine.replicas.lifecycle import Lifecycle, RestartPolicy
from gateway.cli.asking import CommandFailed, ask, client_for
from gateway.cli.bench.installation import Installation, NotMeasured
from gateway.cli.main import build_parser
from gateway.http_server.certificate import names_of
from gateway.serve.banner import banner, still_starting
from gateway.settings import Settings
from tests.unit.gateway.http_server.test_tls import SecureDoor, flags, write_certificate
from tests.unit.gateway.relay.relay_client import COMPLETION
from tests.unit.gateway.running_door import running_door

NOBODY = FleetSnapshot(1, "/m", str(COMPLETION["model"]), "/tables", ())


def lines(settings: Settings) -> dict[str, list[str]]:
    """The words of each line after its first one."""
    found = [shlex.split(line) for line in banner(settings, [NOBODY], None).splitlines() if line.strip()]
    return {words[0]: words[1:] for words in found}


def asked(url: str, *words: str) -> str:
    """The trouble that a command tells of, "" if there is none."""
    with client_for(flags("--url", url, *words), None) as client:
        try:
            ask(client, "/health")
        except CommandFailed as error:
            return str(error)
    return ""


async def test_pasted_commands_reach_a_gateway_that_speaks_https(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door, SecureDoor(door, tmp_path) as secure:
        await door.add_engine("replica-0")
        shown = lines(Settings(port=secure.port, tls_cert=secure.cert, tls_key=secure.key))
        for name in ("try", "readiness"):
            process = await asyncio.create_subprocess_exec(*shown[name], "--fail", stdout=asyncio.subprocess.PIPE)
            await process.communicate()
            assert process.returncode == 0, shown[name]
        figures = shown["figures"]
        parsed = build_parser().parse_args(figures[figures.index("kv") :])
        assert (parsed.url, parsed.cacert) == (secure.url, secure.cert)
        assert await asyncio.to_thread(asked, parsed.url, "--cacert", str(parsed.cacert)) == ""


async def test_a_certificate_for_a_name_alone_is_asked_for_by_that_name(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door, SecureDoor(door, tmp_path) as secure:
        await door.add_engine("replica-0")
        settings = Settings(host="127.0.0.2", port=secure.port, tls_cert=secure.cert, tls_key=secure.key)
        readiness = lines(settings)["readiness"]
        assert readiness[-1] == f"https://one.example:{secure.port}/ready"
        at = readiness.index("--resolve") + 1
        assert readiness[at] == f"one.example:{secure.port}:127.0.0.2"
        readiness[at] = f"one.example:{secure.port}:127.0.0.1"  # where the door of this test listens
        process = await asyncio.create_subprocess_exec(*readiness, "--fail", stdout=asyncio.subprocess.PIPE)
        assert '"ready":true' in (await process.communicate())[0].decode()


def test_names_are_read_from_the_certificate_and_a_broken_one_has_none(tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path, "localhost")
    assert names_of(cert, key) == ("localhost", "127.0.0.1")
    assert lines(Settings(host="127.0.0.2", tls_cert=cert, tls_key=key))["page"] == ["https://localhost:8000/ui"]
    key.write_text("")
    assert names_of(cert, key) == ()
    assert lines(Settings(tls_cert=cert, tls_key=key))["page"] == ["https://127.0.0.1:8000/ui"]


async def test_commands_say_what_is_wrong_with_a_certificate_or_a_scheme(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door, SecureDoor(door, tmp_path) as secure:
        for url, words in (
            (secure.url, f"the certificate of {secure.url} is not trusted: self-signed certificate; --cacert FILE names"),
            (secure.url.replace("https", "http"), f"it may speak HTTPS: ask by --url {secure.url}, with --cacert FILE"),
            (f"https://127.0.0.1:{door.port}", f"does not speak HTTPS; ask it by --url http://127.0.0.1:{door.port}"),
        ):
            assert words in await asyncio.to_thread(asked, url)
            async with Installation(url) as installation:
                with pytest.raises(NotMeasured) as caught:
                    await installation.round_trip()
            assert words in str(caught.value)
        by_name = f"https://localhost:{secure.port}"
        said = await asyncio.to_thread(asked, by_name, "--cacert", str(secure.cert))
        assert "ask by a name that is in it" in said


def test_a_start_is_told_by_the_log_and_before_there_is_one_by_what_is_waited_for() -> None:
    life = Lifecycle(RestartPolicy())
    life.start(0.0)

    def told(last_line: str = "") -> str:
        return still_starting(Replica("replica-1", ReplicaState.STARTING, "", None, 0, life.reason, "cpu", ""), last_line)

    assert told() == "replica-1 is still starting: importing vLLM"
    assert told("Loading weights") == "replica-1 is still starting: Loading weights"
    life.held_back("waiting until replica-0 has started on the same GPU")
    assert told() == "replica-1 is still starting: waiting until replica-0 has started on the same GPU"
