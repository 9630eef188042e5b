"""Settings that are secret, each from a file of its own: `$PEERKV_SECRETS_DIR/peerkv_<setting>`.

So containers and service managers hand them over; a file is read by its user alone, an environment by all that can see the
process.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gateway.errors import SettingsError

SECRETS_DIR_VARIABLE = "PEERKV_SECRETS_DIR"
SECRET_BYTES_MAX = 1 << 20  # thousands of tenants
_PREFIX = "peerkv_"


def read_secret_files() -> dict[str, Any]:
    """The secret settings that have a file; an empty one sets nothing. Raises SettingsError, never with what a file holds."""
    directory = os.environ.get(SECRETS_DIR_VARIABLE)
    if not directory:
        return {}
    found: dict[str, Any] = {}
    if key := _read(Path(directory) / f"{_PREFIX}admin_key"):
        found["admin_key"] = key
    for name in ("vault_password", "limits_valkey_password", "salt_secret"):
        if _read(path := Path(directory) / f"{_PREFIX}{name}"):
            found[f"{name}_file"] = path
    if tenants := _read(path := Path(directory) / f"{_PREFIX}tenants"):
        found["tenants"] = _json(path, tenants)
    return found


def read_secret(path: Path, *, is_json: bool = False) -> Any:
    """What a file holds that a setting names. Raises SettingsError, also if it is empty: nobody meant to let everybody in."""
    content = _read(path)
    if not content:
        raise SettingsError(f"there is nothing in the file {path}, or it is not there")
    return _json(path, content) if is_json else content


def _json(path: Path, content: str) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        raise SettingsError(f"{path} is not JSON") from None


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(SECRET_BYTES_MAX + 1)
        if len(content) > SECRET_BYTES_MAX:
            raise SettingsError(f"{path} has more than {SECRET_BYTES_MAX} bytes")
        return content.decode().strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise SettingsError(f"cannot read the secret {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not text") from None
