"""Salts, which keep tenants' caches apart: made of names with a secret of the server's, so that nobody else can tell one.

A salt is part of the key of every block: in the replicas, in host memory, on disk, in a vault and towards other nodes. Gateways
whose tenants' blocks are to be found by each other need the same secret.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import tempfile
from pathlib import Path

from gateway.errors import SettingsError

SECRET_BYTES_MIN = 16
SECRET_BYTES_MAX = 4096
MADE_BYTES = 32
_CHARS_MAX, _NOT_TAKEN = 120, frozenset("@/\\\0")
"""vLLM (0.33, validate_cache_salt) takes 128 characters and none of these; what marks a lossy cache has to fit behind."""
_TENANT = b"peerkv tenant salt v1"
_GROUP = b"peerkv group salt v1"
_logger = logging.getLogger(__name__)


def tenant_salt(secret: bytes, tenant: str) -> str:
    """The salt of a tenant: HMAC-SHA256 of its name, so that all its keys share a cache, and new ones too."""
    return hmac.new(secret, _TENANT + tenant.encode(), hashlib.sha256).hexdigest()


def group_salt(secret: bytes, group: str) -> str:
    """The salt of all tenants of a group, which no tenant outside of it has, whatever its name."""
    return hmac.new(secret, _GROUP + group.encode(), hashlib.sha256).hexdigest()


def salt_of(secret: bytes, tenant: str, group: str | None) -> str:
    """The salt of a tenant that may be of a group."""
    return tenant_salt(secret, tenant) if group is None else group_salt(secret, group)


def given_salt(given: str) -> str:
    """A salt of the settings as vLLM takes it: as it is, or if vLLM would refuse each request with it, a digest of it."""
    if len(given) <= _CHARS_MAX and _NOT_TAKEN.isdisjoint(given):
        return given
    return hashlib.sha256(given.encode("utf-8", "surrogatepass")).hexdigest()


def new_secret() -> bytes:
    """A secret that nobody has had before."""
    return secrets.token_bytes(MADE_BYTES)


def read_salt_secret(path: Path) -> bytes:
    """A file's content, but for white space around it. Raises SettingsError, never with what the file holds."""
    try:
        with path.open("rb") as file:
            content = file.read(SECRET_BYTES_MAX + 1).strip()
    except OSError as error:
        raise SettingsError(
            f"salt_secret_file: cannot read {path}: {error.strerror}; openssl rand -hex 32 > {path} makes one"
        ) from None
    if not SECRET_BYTES_MIN <= len(content) <= SECRET_BYTES_MAX:
        raise SettingsError(f"salt_secret_file: {path} has to hold {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes")
    return content


def kept_salt_secret(path: Path) -> bytes:
    """The secret in a file of our own, which is made if it is not there, for its owner alone.

    Where none can be kept it lasts as long as the process, which is logged. Raises SettingsError for a file that holds none.
    """
    try:
        if not path.exists():
            _make(path)
    except OSError as error:
        _logger.warning(
            "what caches hold for tenants is lost with a restart: the secret that it is found by cannot be kept: %s: %s "
            "(salt_secret_file)",
            *(path, error.strerror),
        )
        return new_secret()
    return read_salt_secret(path)


def _make(path: Path) -> None:
    """Write a secret, unless another gateway comes first: then its secret stays. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, made = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # of mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(new_secret().hex().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(made, path)
    finally:
        os.unlink(made)
