"""What is wrong with a table of which a file may have several, such as [[models]]: which one, and which key of it. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_NAMES = ("name", "served_model_name", "model")
_NAME_CHARS_MAX = 128


@dataclass(frozen=True, slots=True)
class Tables:
    """`keys` are those that each kind of table may have, `above` those that stand before them all.

    `values` is what was read, as far as it is at hand; `places` says where a kind was read from, if not from the file `place`.
    """

    keys: Mapping[str, Collection[str]]
    above: Collection[str]
    values: Mapping[str, Any]
    place: str = ""
    places: Mapping[str, str] = field(default_factory=dict)

    def in_words(self, detail: Mapping[str, Any], message: Callable[[Mapping[str, Any]], str]) -> str | None:
        """What pydantic's `detail` says, in words of whoever wrote the file; None if it is of no table. Values are left out."""
        kind, path = detail["type"], detail["loc"]
        if not path or path[0] not in self.keys:
            return None
        table, *rest = path
        if not rest or not isinstance(rest[0], int):
            in_a_file = table not in self.places
            return f"{table}: write [[{table}]], with two brackets, for each" if in_a_file and kind == "tuple_type" else None
        where, keys = f"{self._where(table)} number {rest[0] + 1}{self._name(table, rest[0])}", rest[1:]
        if kind == "extra_forbidden":
            return f"{where}: {self.unknown(str(keys[-1]), table)}"
        if kind == "missing":
            return f"{where}: the key '{keys[-1]}' is missing"
        return ": ".join([where, *([".".join(map(str, keys))] if keys else []), message(detail)])

    def unknown(self, key: str, table: str = "") -> str:
        """What to say of a key that is not known in a table, or before all of them, and may belong elsewhere."""
        if table and key in self.above:
            return f"the key '{key}' belongs before the first [[…]]: it is not one of a table's"
        return f"unknown key '{key}'{did_you_mean(key, self.keys[table]) if table else self.hint(key)}"

    def hint(self, key: str) -> str:
        """Where a key belongs that is not known before all tables, as the end of a sentence."""
        others = [f"[[{table}]]" for table, known in self.keys.items() if key in known]
        return f": it belongs into a table {' or '.join(others)}" if others else did_you_mean(key, self.above)

    def _where(self, table: str) -> str:
        return self.places.get(table) or f"{self.place}: [[{table}]]".removeprefix(": ")

    def _name(self, table: str, index: int) -> str:
        found = self.values.get(table)
        entry = found[index] if isinstance(found, Sequence) and not isinstance(found, str) and index < len(found) else None
        names = [entry.get(key) for key in _NAMES] if isinstance(entry, Mapping) else []
        name = next((each for each in names if each and isinstance(each, str)), None)
        return f" ({name[:_NAME_CHARS_MAX]!r})" if name else ""


def did_you_mean(key: str, known: Collection[str]) -> str:
    """The known key that is nearest, as the end of a sentence; "" if none is near."""
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
