"""The replicas' counters across restarts: a restarted replica counts from zero again, the fleet does not."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from gateway.block_registry.tables import Table
from transport.table.deliveries import PeerCounters

_PeerKey = tuple[str, str]


class LifetimeCounters:
    """Sums each replica's counters over its epochs.

    The last table of each replica is kept: its memory stays readable after the owner has died and its file is gone, so its
    final counts are not lost. Call `observe` often enough to see each epoch at least once.
    """

    def __init__(self) -> None:
        self._current: dict[str, Table] = {}
        self._ended: dict[str, Counter[str]] = {}
        self._ended_peers: dict[str, dict[_PeerKey, PeerCounters]] = {}
        self._epochs: Counter[str] = Counter()

    def observe(self, tables: Mapping[str, Table]) -> None:
        """Note the live tables. Cheap: call it whenever they are looked at."""
        for name, table in tables.items():
            known = self._current.get(name)
            if known is table:
                continue
            if known is None or known.epoch != table.epoch:
                self._epochs[name] += 1
                if known is not None:
                    self._ended.setdefault(name, Counter()).update(known.counters())
                    self._ended_peers[name] = _added(self._ended_peers.get(name, {}), known.peers())
            self._current[name] = table

    def table(self, name: str) -> Table | None:
        """Return the replica's last table, None if it was never seen."""
        return self._current.get(name)

    def epochs(self, name: str) -> int:
        """Return how many starts of that replica were seen."""
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

    def peers(self, name: str) -> list[PeerCounters]:
        """Return what the replica imported by peer and transport, summed over its epochs."""
        total = self._ended_peers.get(name, {})
        if name in self._current:
            total = _added(total, self._current[name].peers())
        return [total[key] for key in sorted(total)]


def _added(total: Mapping[_PeerKey, PeerCounters], more: Sequence[PeerCounters]) -> dict[_PeerKey, PeerCounters]:
    added = dict(total)
    for peer in more:
        key = (peer.name, peer.transport)
        before = added.get(key)
        added[key] = peer if before is None else _sum(before, peer)
    return added


def _sum(one: PeerCounters, other: PeerCounters) -> PeerCounters:
    return replace(
        one,
        imports=one.imports + other.imports,
        blocks=one.blocks + other.blocks,
        bytes=one.bytes + other.bytes,
        seconds=one.seconds + other.seconds,
        failures=one.failures + other.failures,
    )
