"""The keys file: read whole or not at all, written atomically and for its owner alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gateway.errors import GatewayError
from gateway.plain_errors import plain
from gateway.table_errors import Tables
from gateway.tenants.keys import DIGEST_CHARS, Key, Keys, no_keys

FILE_BYTES_MAX = 16 << 20  # tens of thousands of keys
MODE = 0o600
_READABLE_BY_OTHERS = 0o077
_HEADER = "# API keys of peerkv, as digests. `peerkv keys` rewrites this file, without comments.\n"


class KeyFileError(GatewayError):
    """The keys file cannot be used; one line that names it and says what is wrong."""


def read_keys(path: Path) -> Keys:
    """The content of the file. Raises KeyFileError, never with a text that the file holds but for the keys' names."""
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise KeyFileError(
            f"there is no keys file {path}; `peerkv keys add NAME --keys-file {path}` makes the first key"
        ) from None
    except OSError as error:
        raise KeyFileError(f"cannot read the keys file {path}: {error.strerror}") from None
    if len(content) > FILE_BYTES_MAX:
        raise KeyFileError(f"the keys file {path} has more than {FILE_BYTES_MAX} bytes")
    try:
        values = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        raise KeyFileError(f"the keys file {path} is not TOML: {error}") from None
    try:
        return Keys.model_validate(values)
    except ValidationError as error:
        raise KeyFileError(f"the keys file {path} is wrong: {_in_words(error, values)}") from None


def write_keys(path: Path, keys: Keys) -> None:
    """Replace the file. Raises KeyFileError."""
    real = Path(os.path.realpath(path))
    try:
        real.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(prefix=f".{real.name}.", dir=real.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), MODE)
                _keep_owner(file.fileno(), real)
                file.write(as_toml(keys).encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(made, real)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(made)
            raise
    except OSError as error:
        raise KeyFileError(f"cannot write the keys file {path}: {error.strerror}") from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[Keys]:
    """The file's content, an empty one's where there is none, while no other command changes it. Raises KeyFileError."""
    directory = Path(os.path.realpath(path)).parent
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeyFileError(f"cannot use the directory of the keys file {path}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield read_keys(path) if path.exists() else no_keys()
    finally:
        os.close(handle)


def readable_by_others(path: Path) -> bool:
    """Whether anybody but its owner has rights to the file; False if there is none."""
    try:
        return bool(path.stat().st_mode & _READABLE_BY_OTHERS)
    except OSError:
        return False


def as_toml(keys: Keys) -> str:
    """The file's text."""
    parts = [_HEADER, f'salt_secret = "{keys.salt_secret}"\n']
    return "".join(parts + [_table(key) for key in keys.keys])


def _table(key: Key) -> str:
    values = key.model_dump(exclude_none=True)
    lines = [f"{name} = {_value(value)}\n" for name, value in values.items() if value != ()]
    return "\n[[keys]]\n" + "".join(sorted(lines, key=lambda line: not line.startswith(("name", "tenant"))))


def _value(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    # A string of JSON is one of TOML, but for DEL, which it would not escape.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _keep_owner(handle: int, path: Path) -> None:
    """Leave the file to whom it belonged: root may run the command for the gateway's user."""
    with contextlib.suppress(OSError):
        found = path.stat()
        if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(handle, found.st_uid, found.st_gid)


def _in_words(error: ValidationError, values: Mapping[str, Any]) -> str:
    tables, parts = Tables({"keys": Key.model_fields}, Keys.model_fields, values), []
    for detail in error.errors(include_url=False):
        place = ".".join(map(str, detail["loc"]))
        if detail["type"] == "missing" and detail["loc"][-1] == "tenant":  # which is the name if nothing else is said
            continue
        words = tables.in_words(detail, _message)
        if words is None and detail["type"] == "extra_forbidden":
            words = tables.unknown(place)
        if words is None and detail["type"] == "missing":
            words = f"the key '{place}' is missing"
        parts.append(words or (f"{place}: {_message(detail)}" if place else _message(detail)))
    return "; ".join(parts)


def _message(detail: Mapping[str, Any]) -> str:
    """What is wrong with a value: a text is not shown, whatever it should be."""
    kind, path = detail["type"], detail["loc"]
    if kind == "string_pattern_mismatch":
        return f"must be {DIGEST_CHARS} of the digits 0-9 and a-f"
    if kind.startswith("datetime"):
        return "must be a date, or a date and a time, such as 2027-01-31 or 2027-01-31T12:00:00Z"
    shown = {**detail, "input": None} if isinstance(detail["input"], str) else detail
    field = Key.model_fields.get(path[2]) if len(path) > 2 else None
    return plain(shown, field) or str(detail["msg"]).removeprefix("Value error, ")
