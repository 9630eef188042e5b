"""TLS: the listener's certificate, read again when its file changes."""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path

from gateway.errors import SettingsError
from gateway.file_watch import POLL_SECONDS, FileWatch


class Certificate:
    """A certificate chain and its key, in PEM. New connections get what was read last, while `watch` is run.

    Raises SettingsError if they cannot be used. A broken file later on changes nothing but the log.
    """

    def __init__(self, cert: Path, key: Path, poll_seconds: float = POLL_SECONDS) -> None:
        self._cert, self._key = cert, key
        self.context = _empty_context()
        self._load()
        self.watch = FileWatch([cert, key], self._take, "the previous certificate stays in use", poll_seconds)

    async def _take(self) -> str:
        self._load()  # not in a thread: the context serves connections meanwhile
        return f"the certificate {self._cert} was read again"

    def _load(self) -> None:
        """Raises SettingsError."""
        try:
            # A certificate and a key that do not belong together would leave a context without either.
            for context in (_empty_context(), self.context):
                context.load_cert_chain(self._cert, self._key, password="")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise SettingsError(f"tls_cert, tls_key: {self._why(error)}") from None

    def _why(self, error: Exception) -> str:
        for path in (self._cert, self._key):
            try:
                path.open("rb").close()
            except OSError as unread:
                return f"cannot read {path}: {unread.strerror}"
        reason = getattr(error, "reason", None) or str(error)
        return f"{self._cert} and {self._key} are no certificate and its key in PEM, without a password: {reason}"


def names_of(cert: Path, key: Path) -> tuple[str, ...]:
    """The names and addresses in the certificate, found by a handshake in memory; none if a client would not take it today."""
    listening, calling = _empty_context(), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    calling.check_hostname = False  # the names are what is asked for
    calling.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    there, here = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        listening.load_cert_chain(cert, key, password="")
        calling.load_verify_locations(cert)
        client, server = calling.wrap_bio(here, there), listening.wrap_bio(there, here, server_side=True)
        for end in (client, server, client):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
        found = client.getpeercert() or {}
    except (OSError, ValueError):  # ssl.SSLError is an OSError; getpeercert's ValueError: the handshake did not end
        return ()
    return tuple(str(pair[1]) for pair in found.get("subjectAltName", ()))


def _empty_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context
