"""What is wrong with settings, in one line. Texts are left out, as one may be a secret; numbers, switches and choices are
shown."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import SettingsError as PydanticSettingsError

from gateway.plain_errors import plain
from gateway.table_errors import Tables

_TENANTS = '[{"name": "acme", "api_key": "…"}]'
# What Kubernetes sets for each service whose name begins with peerkv, such as PEERKV_PORT=tcp://10.0.0.1:8000.
_SERVICE_VARIABLE = re.compile(r"PEERKV_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://.+")
_FIELD = re.compile(r'field "(\w+)"')


def in_words(
    error: ValidationError, tables: Tables, fields: Mapping[str, FieldInfo], of_file: Collection[str] = frozenset()
) -> str:
    """One line for all that is wrong; `fields` are the settings, of which the file `tables.place` has those `of_file`."""
    parts = []

    def message(detail: Mapping[str, Any]) -> str:
        return _message(detail, _field(detail["loc"], tables, fields))

    for detail in error.errors(include_url=False):
        if detail["type"] == "default_factory_not_called":  # follows from another error in the list
            continue
        if (words := tables.in_words(detail, message)) is not None:
            parts.append(words)
            continue
        place = ".".join(str(part) for part in detail["loc"])
        if tables.place and detail["loc"] and detail["loc"][0] in of_file:
            place = f"{tables.place}: {place}"
        parts.append(f"{place}: {message(detail)}" if place else message(detail))
    return "; ".join(parts)


def not_json(error: PydanticSettingsError, prefix: str) -> str:
    """What to say of a variable that should hold JSON and does not; `prefix` is that of all variables."""
    found = _FIELD.search(str(error))
    if found is None:
        return f"{error}: {error.__cause__}"
    example = f"; for example {_TENANTS}" if found[1] == "tenants" else ""
    return f"{prefix}{found[1].upper()} is not JSON{example}"


def _field(path: Sequence[Any], tables: Tables, fields: Mapping[str, FieldInfo]) -> FieldInfo | None:
    """The setting, or the key of a table, that is wrong; None if it is none."""
    found: Any = fields
    if len(path) > 2 and path[0] in tables.keys:
        found, path = tables.keys[path[0]], path[2:]
    return found.get(path[0]) if path and isinstance(found, Mapping) else None


def _message(detail: Mapping[str, Any], field: FieldInfo | None) -> str:
    kind, given = detail["type"], detail.get("ctx", {})
    if kind in ("byte_size", "byte_size_unit"):
        return f"'{detail['input']}' is not a size: write bytes, or such as 512MiB, 4GiB"
    if kind == "too_short" and given["field_type"] == "Value":  # as pydantic calls a secret
        return f"must have at least {given['min_length']} characters, has {given['actual_length']}"
    if kind == "tuple_type" and detail["loc"] == ("tenants",):
        return f"must be a list, for example {_TENANTS}"
    return plain(detail, field) or str(detail["msg"]).removeprefix("Value error, ")


def is_of_a_service(variable: str, value: str) -> bool:
    """Whether an orchestrator set a variable to say where a service is: no error, and no setting."""
    return bool(_SERVICE_VARIABLE.fullmatch(variable) or (variable.endswith("_PORT") and _SERVICE_ADDRESS.fullmatch(value)))
