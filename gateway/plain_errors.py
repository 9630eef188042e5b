"""What is wrong with one value, in plain words in place of pydantic's: what it must be, and what was given. Pure.

Only values of numbers, switches and choices are shown: a text may be a secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

SHOWN_CHARS_MAX = 40
_WHOLE = frozenset({"int_type", "int_parsing", "int_from_float", "int_parsing_size"})
_NUMBER = frozenset({"float_type", "float_parsing", "finite_number"})
_BOUND = frozenset({"greater_than", "greater_than_equal", "less_than", "less_than_equal"})
_OTHERS = {
    "string_type": "must be a text",
    "path_type": "must be a path, as a text",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a table",
    "model_type": "must be a table",
}


def plain(detail: Mapping[str, Any], field: FieldInfo | None) -> str | None:
    """Say pydantic's `detail` of the setting or key `field`; None for what already is in our words, or is of another kind."""
    kind = detail["type"]
    if kind in _OTHERS:
        return _OTHERS[kind]
    if kind in _WHOLE or kind in _NUMBER or kind in _BOUND:
        what = "a whole number" if kind in _WHOLE or (field is not None and _is_whole(field)) else "a number"
        return f"must be {what}{_range(detail, field)}{_not(detail)}"
    if kind in ("bool_type", "bool_parsing"):
        return f"must be true or false{_not(detail)}"
    if kind == "literal_error":
        return f"must be {detail['ctx']['expected']}{_not(detail)}"
    return None


def _is_whole(field: FieldInfo) -> bool:
    return field.annotation in (int, int | None)


def _range(detail: Mapping[str, Any], field: FieldInfo | None) -> str:
    bounds = {name: value for name, value in detail.get("ctx", {}).items() if name in ("ge", "gt", "le", "lt")}
    for each in field.metadata if field is not None else ():
        for name, kind in (("ge", Ge), ("gt", Gt), ("le", Le), ("lt", Lt)):
            if isinstance(each, kind):
                bounds[name] = getattr(each, name)
    if bounds.keys() == {"ge", "le"}:
        return f" from {_number(bounds['ge'])} to {_number(bounds['le'])}"
    words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    told = " and ".join(f"{words[name]} {_number(bounds[name])}" for name in words if name in bounds)
    return f" {told}" if told else ""


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.15g}"


def _not(detail: Mapping[str, Any]) -> str:
    given = detail.get("input")
    if not isinstance(given, str | int | float):
        return ""
    text = repr(given) if isinstance(given, str) else str(given).lower() if isinstance(given, int) else f"{given:.15g}"
    return f", not {text}" if len(text) <= SHOWN_CHARS_MAX else ""
