"""The secret with which what disk and vault keep is encrypted and authenticated: without it nobody can read or forge it."""

import hashlib
import hmac
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

SECRET_BYTES_MIN = 16
SECRET_BYTES_MAX = 4096


class SecretRefused(ValueError):
    """There is no secret to use; the message says why, and never what the file holds."""


@dataclass(frozen=True, slots=True)
class Secrecy:
    """`key` is what the keys of tenants are derived from, None if frames are not encrypted; `mark` tells frames of different
    secrets apart, in their ids."""

    key: bytes | None = field(default=None, repr=False)
    mark: bytes = b""

    def key_of(self, tenant: int) -> bytes | None:
        """Return the 32 bytes that encrypt the frames of a tenant, known by the mark that their headers have; None for no key.

        One step of HKDF-Expand (RFC 5869) with SHA-256.
        """
        if self.key is None:
            return None
        return hmac.digest(self.key, b"peerkv-tenant" + tenant.to_bytes(2, "little") + b"\x01", "sha256")


OPEN = Secrecy()
"""Nothing is encrypted."""


def read_secret(path: Path) -> Secrecy:
    """Return what a file's content, but for white space around it, makes. Raises SecretRefused."""
    try:
        content = path.read_bytes()[: SECRET_BYTES_MAX + 1].strip()
    except OSError as error:
        raise SecretRefused(f"the secret of disk and vault cannot be read: {path}: {error.strerror}") from None
    if not SECRET_BYTES_MIN <= len(content) <= SECRET_BYTES_MAX:
        raise SecretRefused(f"{path} has to hold {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes: openssl rand -hex 32 > {path}")
    if importlib.util.find_spec("cryptography") is None:
        raise SecretRefused("encrypting disk and vault takes a package: pip install cryptography")
    return Secrecy(_derived(b"tenants", content), _derived(b"ids", content)[:8])


def _derived(what: bytes, content: bytes) -> bytes:
    """A key of its own for each use: the file holds a secret of much entropy, not a password."""
    return hashlib.blake2b(content, digest_size=32, person=b"peerkv-" + what).digest()
