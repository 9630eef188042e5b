"""The secret with which what disk and vault keep is encrypted and authenticated: without it nobody can read or forge it."""

import hashlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

SECRET_BYTES_MIN = 16
SECRET_BYTES_MAX = 4096


class SecretRefused(ValueError):
    """There is no secret to use; the message says why, and never what the file holds."""


@dataclass(frozen=True, slots=True)
class Secrecy:
    """`key` encrypts frames, None if they are not; `mark` tells frames of different secrets apart, in their ids."""

    key: bytes | None = field(default=None, repr=False)
    mark: bytes = b""


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
    return Secrecy(_derived(b"key", content), _derived(b"mark", content)[:8])


def _derived(what: bytes, content: bytes) -> bytes:
    """A key of its own for each use: the file holds a secret of much entropy, not a password."""
    return hashlib.blake2b(content, digest_size=32, person=b"peerkv-" + what).digest()
