"""Vaults for tests: a real Valkey server, and servers that answer what they are told."""

import contextlib
import datetime
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from engine.frame_tiers.vault.address import VaultAddress
from engine.frame_tiers.vault.connection import Connection
from engine.frame_tiers.vault.resp import VaultGone

PASSWORD = 'pass "word\\'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`peerkv vault`'s server in a process of its own."""

    def __init__(self, directory, bytes_max=64 << 20, port=0, password=PASSWORD, **about):
        self.address = VaultAddress("127.0.0.1", port or free_port(), password=password or None)
        self.directory, self.bytes_max, self.about = directory, bytes_max, about
        self.process = None

    def start(self) -> None:
        code = (
            "from pathlib import Path; from engine.frame_tiers.vault.server import VaultServer; "
            f"VaultServer('127.0.0.1', {self.address.port}, {self.bytes_max}, {self.address.password or ''!r}, "
            f"directory=Path({str(self.directory)!r})).run()"
        )
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(VaultGone):
                Connection(self.address, None, time.monotonic() + 1).close()
                return
            assert time.monotonic() < deadline, "no Valkey server"
            time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def valkey(directory, **about) -> Iterator[Server]:
    server = Server(directory, **about)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def answering(answer: bytes, every: float = 0.0) -> Iterator[VaultAddress]:
    """A server that answers the first thing it hears with `answer`, a byte `every` so many seconds if told so."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()
    held = []

    def talk(client):
        with contextlib.suppress(OSError):
            client.recv(65536)
            if every:
                for place in range(len(answer)):
                    client.sendall(answer[place : place + 1])
                    if ended.wait(every):
                        return
            else:
                client.sendall(answer)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                held.append(client)
                threading.Thread(target=talk, args=(client,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield VaultAddress("127.0.0.1", listener.getsockname()[1])
    finally:
        ended.set()
        listener.close()
        for client in held:
            client.close()


@contextlib.contextmanager
def tls_in_front(address: VaultAddress, directory) -> Iterator[VaultAddress]:
    """The same vault behind TLS, with a certificate of its own authority."""
    certificate, private_key = _certificate(directory)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private_key)
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=meet, args=(client,), daemon=True).start()

    def meet(client):
        with contextlib.suppress(OSError):
            inside = context.wrap_socket(client, server_side=True)
            behind = socket.create_connection((address.host, address.port))
            threading.Thread(target=pump, args=(inside, behind), daemon=True).start()
            pump(behind, inside)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield replace(address, host="localhost", port=listener.getsockname()[1], tls=True, ca_file=str(certificate))
    finally:
        listener.close()


def _certificate(directory):
    private_key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private_key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private_key, hashes.SHA256())
    )
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (directory / "cert.pem").write_bytes(made.public_bytes(pem))
    (directory / "key.pem").write_bytes(private_key.private_bytes(pem, form, serialization.NoEncryption()))
    return directory / "cert.pem", directory / "key.pem"
