"""What is wrong with settings, in one line. Values are left out, as one may be a secret; only a size is shown."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError
from pydantic_settings import SettingsError as PydanticSettingsError

_TENANTS = '[{"name": "acme", "api_key": "…"}]'
_FIELD = re.compile(r'field "(\w+)"')


def in_words(error: ValidationError) -> str:
    """One line for all that is wrong."""
    parts = []
    for detail in error.errors(include_url=False):
        if detail["type"] == "default_factory_not_called":  # follows from another error in the list
            continue
        place = ".".join(str(part) for part in detail["loc"])
        parts.append(f"{place}: {_message(detail)}" if place else _message(detail))
    return "; ".join(parts)


def not_json(error: PydanticSettingsError, prefix: str) -> str:
    """What to say of a variable that should hold JSON and does not; `prefix` is that of all variables."""
    found = _FIELD.search(str(error))
    if found is None:
        return f"{error}: {error.__cause__}"
    example = f"; for example {_TENANTS}" if found[1] == "tenants" else ""
    return f"{prefix}{found[1].upper()} is not JSON{example}"


def _message(detail: Any) -> str:
    kind, given = detail["type"], detail.get("ctx", {})
    if kind in ("byte_size", "byte_size_unit"):
        return f"'{detail['input']}' is not a size: write bytes, or such as 512MiB, 4GiB"
    if kind == "too_short" and given["field_type"] == "Value":  # as pydantic calls a secret
        return f"must have at least {given['min_length']} characters, has {given['actual_length']}"
    if kind == "tuple_type" and detail["loc"] == ("tenants",):
        return f"must be a list, for example {_TENANTS}"
    return str(detail["msg"]).removeprefix("Value error, ")
