"""The listener speaks HTTPS with a certificate of ours, takes up a new one while it runs, and our commands check it."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import ipaddress
import json
import ssl
import sys
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gateway.cli.asking import add_gateway_flags, client_for
from gateway.errors import SettingsError
from gateway.http_server.certificate import Certificate
from gateway.http_server.server import bind, build_server
from gateway.settings import Settings, address
from tests.unit.gateway.relay.relay_client import COMPLETION
from tests.unit.gateway.running_door import Door, running_door, until

HEALTHCHECK = Path(__file__).parents[4] / "docker" / "healthcheck.py"


def write_certificate(directory: Path, name: str) -> tuple[Path, Path]:
    """A certificate that signs itself, for `name` and 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder(subject_name=subject, issuer_name=subject, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert, private = directory / "cert.pem", directory / "key.pem"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert, private


class SecureDoor:
    """A running front door behind a second listener that speaks TLS."""

    def __init__(self, door: Door, directory: Path) -> None:
        self.cert, self.key = write_certificate(directory, "one.example")
        self.certificate = Certificate(self.cert, self.key, poll_seconds=0.02)
        self._door = door

    async def __aenter__(self) -> SecureDoor:
        listener = bind("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.url = f"https://127.0.0.1:{self.port}"
        app = self._door.server.config.app
        self._server = build_server(app, Settings(run_dir=self._door.directory, drain_seconds=1), self.certificate)
        self._tasks = [
            asyncio.create_task(self._server.serve(sockets=[listener])),
            asyncio.create_task(self.certificate.watch.run()),
        ]
        await until(lambda: self._server.started)
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._server.should_exit = True
        await self._tasks[0]
        self._tasks[1].cancel()

    def served(self) -> str:
        """The certificate that a new connection gets."""
        return ssl.get_server_certificate(("127.0.0.1", self.port))


async def test_requests_and_streams_come_by_https(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door, SecureDoor(door, tmp_path) as secure:
        await door.add_engine("replica-0")
        trusted = ssl.create_default_context(cafile=secure.cert)
        async with aiohttp.ClientSession() as session:
            for stream in (False, True):
                async with session.post(
                    f"{secure.url}/v1/completions", json={**COMPLETION, "stream": stream}, ssl=trusted
                ) as answer:
                    assert answer.status == 200
                    text = await answer.text()
            assert text.endswith("data: [DONE]\n\n")
            large = {**COMPLETION, "prompt": "x", "user": "u" * (2 << 20)}
            async with session.post(f"{secure.url}/v1/completions", json=large, ssl=trusted) as answer:
                assert answer.status == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            async with aiohttp.ClientSession() as session, session.get(f"{secure.url}/health"):
                pass


async def test_who_never_begins_to_speak_tls_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.http_server.server.HANDSHAKE_SECONDS_MAX", 0.2)
    async with running_door(tmp_path) as door, SecureDoor(door, tmp_path) as secure:
        reader, writer = await asyncio.open_connection("127.0.0.1", secure.port)
        async with asyncio.timeout(20):  # it would be a minute
            assert await reader.read() == b""
        writer.close()


async def test_old_versions_of_tls_and_plain_http_are_not_spoken(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door, SecureDoor(door, tmp_path) as secure:
        old = ssl.create_default_context(cafile=secure.cert)
        old.minimum_version, old.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, ssl.TLSVersion.TLSv1_1
        for context, url in ((old, secure.url), (ssl.create_default_context(), secure.url.replace("https", "http"))):
            async with aiohttp.ClientSession() as session:
                with pytest.raises(aiohttp.ClientError):
                    await session.get(f"{url}/health", ssl=context)


async def test_a_new_certificate_is_taken_up_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_door(tmp_path) as door, SecureDoor(door, tmp_path) as secure:
        first = await asyncio.to_thread(secure.served)
        assert first == secure.cert.read_text()
        other = tmp_path / "other"
        other.mkdir()
        cert, key = write_certificate(other, "two.example")
        secure.cert.write_bytes(cert.read_bytes())  # whose key is not there yet
        await until(lambda: "stays in use" in caplog.text)
        assert await asyncio.to_thread(secure.served) == first
        secure.key.write_bytes(key.read_bytes())

        async def is_new() -> bool:
            return await asyncio.to_thread(secure.served) == cert.read_text()

        await until(is_new)


@pytest.mark.parametrize(("cert", "key"), [("nothing", "key.pem"), ("key.pem", "key.pem"), ("cert.pem", "nothing")])
def test_what_is_no_certificate_is_said_in_words(tmp_path: Path, cert: str, key: str) -> None:
    write_certificate(tmp_path, "one.example")
    with pytest.raises(SettingsError, match=r"tls_cert, tls_key: (cannot read .*nothing|.* are no certificate and its key)"):
        Certificate(tmp_path / cert, tmp_path / key)


def test_a_certificate_needs_its_key() -> None:
    with pytest.raises(ValueError, match="give both or none"):
        Settings(tls_cert=Path("cert.pem"))
    assert address(Settings(tls_cert=Path("c"), tls_key=Path("k"), port=1001)) == "https://127.0.0.1:1001"


def flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_gateway_flags(parser)
    return parser.parse_args(words)


async def test_commands_on_this_machine_trust_the_gateways_own_certificate_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_door(tmp_path) as door, SecureDoor(door, tmp_path) as secure:

        def ready(*words: str) -> int:
            with client_for(flags("--port", str(secure.port), *words), None) as client:
                return client.get("/health").status_code

        monkeypatch.setenv("PEERKV_TLS_CERT", str(secure.cert))
        monkeypatch.setenv("PEERKV_TLS_KEY", str(secure.key))
        assert await asyncio.to_thread(ready) == 200
        other = tmp_path / "other"
        other.mkdir()
        monkeypatch.setenv("PEERKV_TLS_CERT", str(write_certificate(other, "one.example")[0]))
        with pytest.raises(httpx.ConnectError, match="verify failed"):
            await asyncio.to_thread(ready)
        by_url = ("--url", secure.url)
        assert await asyncio.to_thread(ready, *by_url, "--cacert", str(secure.cert)) == 200
        with pytest.raises(SettingsError, match="cannot check"):
            await asyncio.to_thread(ready, *by_url, "--cacert", str(tmp_path / "nothing"))


async def test_the_containers_health_check_asks_by_https(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door, SecureDoor(door, tmp_path) as secure:
        await door.add_engine("replica-0")
        environment = {"PEERKV_PORT": str(secure.port), "PEERKV_TLS_CERT": str(secure.cert)}
        for extra, status in ((environment, 0), ({**environment, "PEERKV_TLS_CERT": ""}, 1)):
            process = await asyncio.create_subprocess_exec(sys.executable, str(HEALTHCHECK), "gateway", env=extra)
            assert await process.wait() == status
        async with aiohttp.ClientSession() as session, session.get(f"{secure.url}/ready", ssl=False) as answer:
            assert json.loads(await answer.text())["ready"] is True
