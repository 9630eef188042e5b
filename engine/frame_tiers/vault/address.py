"""Where a vault is, and how to get in: `valkey://[user[:password]@]host[:port][/database]`, `valkeys://` with TLS."""

import ssl
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

PORT = 6379
_SCHEMES = {"valkey": False, "redis": False, "valkeys": True, "rediss": True}


class AddressRefused(ValueError):
    """It is no vault's address; the message says why, without the password."""


@dataclass(frozen=True, slots=True)
class VaultAddress:
    """`password` is None where none is needed; `user` "" is the server's default one."""

    host: str
    port: int = PORT
    tls: bool = False
    user: str = ""
    password: str | None = field(default=None, repr=False)
    database: int = 0
    ca_file: str = ""

    @property
    def shown(self) -> str:
        """The address without who gets in."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'valkeys' if self.tls else 'valkey'}://{host}:{self.port}/{self.database}"

    def context(self) -> ssl.SSLContext | None:
        """Return how TLS is spoken, None without. The server's name is checked. Raises OSError, ssl.SSLError."""
        if not self.tls:
            return None
        return ssl.create_default_context(cafile=self.ca_file or None)


def parse(url: str, whose: str = "the vault") -> VaultAddress:
    """`whose` it is, messages say. Raises AddressRefused."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise AddressRefused(f"{whose}'s address is not a URL: {error}") from None
    if parts.scheme not in _SCHEMES or not parts.hostname:
        raise AddressRefused(
            f"{whose}'s address is not like valkey://host:6379 or, with TLS, valkeys://user:password@host:6379"
        )
    database = parts.path.strip("/") or "0"
    if not database.isdecimal() or parts.query or parts.fragment:
        raise AddressRefused(
            f"behind {whose}'s host and port there is only the number of a database, as in valkey://host:6379/1"
        )
    return VaultAddress(
        parts.hostname,
        port or PORT,
        _SCHEMES[parts.scheme],
        unquote(parts.username or ""),
        unquote(parts.password) if parts.password is not None else None,
        int(database),
    )


def with_secrets(
    address: VaultAddress, password_file: Path | None, ca_file: Path | None, whose: str = "the vault"
) -> VaultAddress:
    """Add what files hold. Raises AddressRefused if they cannot be read."""
    try:
        if password_file is not None:
            address = replace(address, password=password_file.read_text("utf-8").strip())
        if ca_file is not None:
            address = replace(address, ca_file=str(ca_file), tls=address.tls)
            address.context()
    except (OSError, UnicodeDecodeError) as error:
        raise AddressRefused(f"a file for {whose} cannot be used: {error}") from None
    return address
