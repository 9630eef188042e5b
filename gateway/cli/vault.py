"""`peerkv vault`: a Valkey server for KV blocks, in the foreground, with what a cache wants set."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError

from engine.frame_tiers.vault.server import NoServer, VaultServer
from gateway.errors import SettingsError

PORT = 6379
PORT_MAX = 65535
MEMORY = "4GiB"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "vault",
        help="run a Valkey server that keeps KV blocks for several nodes",
        description="Run a Valkey server that keeps KV blocks for several nodes, until it is told to end. What is asked for"
        " least gives way when its memory is full; nothing is written to disk. Give replicas --vault valkey://HOST:PORT.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1; for example --host 0.0.0.0)",
    )
    parser.add_argument(
        "--port", type=int, default=PORT, metavar="N", help=f"port to listen on (default: {PORT}; for example --port 7000)"
    )
    parser.add_argument(
        "--memory", default=MEMORY, metavar="SIZE", help=f"memory for blocks (default: {MEMORY}; for example --memory 64GiB)"
    )
    parser.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help="file with the password that clients need, a must beyond this machine (default: none; for example"
        " --password-file /run/secrets/vault)",
    )
    parser.add_argument(
        "--tls-cert-file", type=Path, metavar="FILE", help="certificate, with which clients need valkeys:// (default: no TLS)"
    )
    parser.add_argument("--tls-key-file", type=Path, metavar="FILE", help="the certificate's private key (default: no TLS)")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Become the server. Raises SettingsError."""
    try:
        server(arguments).run()
    except (NoServer, OSError, ValueError) as error:
        raise SettingsError(str(error)) from None
    return 0


def server(arguments: argparse.Namespace) -> VaultServer:
    """Return what is to be run. Raises SettingsError."""
    try:
        size = TypeAdapter(ByteSize).validate_python(arguments.memory)
    except ValidationError:
        raise SettingsError(f"--memory {arguments.memory} is no size; for example --memory 64GiB") from None
    password = ""
    if arguments.password_file is not None:
        try:
            password = arguments.password_file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"the password cannot be read: {error}") from None
        if not password:
            raise SettingsError(f"{arguments.password_file} is empty: write the password into it, or leave --password-file out")
    if not password and arguments.host not in _LOOPBACK:
        raise SettingsError(f"whoever reaches {arguments.host} could read and change every block: give a --password-file")
    if not 0 < arguments.port <= PORT_MAX:
        raise SettingsError(f"--port {arguments.port} is no port: 1 to {PORT_MAX}")
    if (arguments.tls_cert_file is None) != (arguments.tls_key_file is None):
        raise SettingsError("--tls-cert-file and --tls-key-file need each other")
    # Absolute, since the server looks for its files from the directory that it is given.
    cert, key = (None if path is None else path.absolute() for path in (arguments.tls_cert_file, arguments.tls_key_file))
    return VaultServer(arguments.host, arguments.port, int(size), password, cert, key, Path(tempfile.gettempdir()))
