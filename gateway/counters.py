"""The replicas' counters over all their lives: a restarted replica counts from zero again, the fleet does not."""

from collections import Counter
from collections.abc import Mapping

from gateway.tables import Table


class CounterLedger:
    """Sums each replica's counters over its epochs.

    The last table of each replica is kept: its memory stays readable when the owner is dead and its file gone, so what it
    counted up to its end is not lost. Call `observe` often enough to see each epoch at least once.
    """

    def __init__(self) -> None:
        self._current: dict[str, Table] = {}
        self._ended: dict[str, Counter[str]] = {}
        self._epochs: Counter[str] = Counter()

    def observe(self, tables: Mapping[str, Table]) -> None:
        """Take note of the live tables. Cheap: call it with each look at them."""
        for name, table in tables.items():
            known = self._current.get(name)
            if known is table:
                continue
            if known is None or known.epoch != table.epoch:
                self._epochs[name] += 1
                if known is not None:
                    self._ended.setdefault(name, Counter()).update(known.counters())
            self._current[name] = table

    def epochs(self, name: str) -> int:
        """How many lives of that replica were seen."""
        return self._epochs[name]

    def names(self) -> list[str]:
        """All replicas ever seen."""
        return sorted(self._current)

    def counters(self, name: str) -> dict[str, int]:
        """Return the replica's counters, summed over its epochs; empty for one that was never seen."""
        total = Counter(self._ended.get(name, Counter()))
        if name in self._current:
            total.update(self._current[name].counters())
        return dict(total)
