"""What the block tables say about one request: who holds how much of its prefix, and who can import from whom."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gateway.chains import ChainCache
from gateway.counters import CounterLedger
from gateway.tables import Table, Tables
from gateway.token_ids import TokenIds
from transport.fingerprint import fingerprint_difference
from transport.keys import HASHES, Keys, root_key

STATUS_OK = "ok"
KEY_CACHE_BYTES_MAX = 32 << 20


@dataclass(frozen=True, slots=True)
class Holding:
    """`blocks` leading blocks of `block_size` tokens are held; imports are possible from `exchanges_with`.

    `chain` says which of the look-up's chains is the replica's.
    """

    blocks: int
    block_size: int
    exchanges_with: frozenset[str]
    chain: int = 0

    @property
    def tokens(self) -> int:
        return self.blocks * self.block_size


@dataclass(frozen=True, slots=True)
class LookUp:
    """Holdings by replica name, for each with a live table whose hash is known.

    `keys` are the chains that were looked up, with block sizes.
    """

    holdings: Mapping[str, Holding] = field(default_factory=dict)
    keys: tuple[tuple[Keys, int], ...] = ()


class Registry:
    """A view over the live tables. Belongs to one thread, as the directory does."""

    def __init__(self, directory: Tables, key_cache_bytes_max: int = KEY_CACHE_BYTES_MAX) -> None:
        self._directory = directory
        self._chains = ChainCache(key_cache_bytes_max)
        self.ledger = CounterLedger()
        self._last: Mapping[str, Table] = {}
        self._exchanges: tuple[tuple[tuple[str, int], ...], dict[str, frozenset[str]]] = ((), {})
        self._refused: set[tuple[tuple[str, int], tuple[str, int]]] = set()

    def tables(self) -> Mapping[str, Table]:
        """Return the live tables by replica name; their counters go into the ledger."""
        self._last = self._directory.tables()
        self.ledger.observe(self._last)
        return self._last

    def table(self, name: str) -> Table | None:
        """Return one replica's table as `tables` last had it, which costs nothing; its owner may have died since."""
        return self._last.get(name)

    def look_up(self, ids: Sequence[int], salt: str = "", lora: str = "", tables: Mapping[str, Table] | None = None) -> LookUp:
        """Find who holds how much of a prompt. The chain is hashed once per distinct fingerprint, block size and hash.

        The last token is always computed, so a block that ends with it does not count. `tables` are those to look in, if the
        caller has just asked for them.
        """
        if not isinstance(ids, TokenIds):
            ids = TokenIds.of(ids)
        if tables is None:
            tables = self.tables()
        exchanges = self.exchanges(tables)
        chains: dict[tuple[bytes, int, str], Keys] = {}
        places: dict[tuple[bytes, int, str], int] = {}
        holdings: dict[str, Holding] = {}
        for name, table in tables.items():
            if table.hash_name not in HASHES:  # of a later version, or damaged: it holds nothing that we could name
                continue
            kind = (table.fingerprint, table.block_size, table.hash_name)
            keys = chains.get(kind)
            if keys is None:
                root = root_key(table.fingerprint, salt, lora, table.hash_name)
                blocks = max(0, len(ids) - 1) // table.block_size
                keys = chains[kind] = self._chains.keys(root, ids, blocks, table.block_size, table.hash_name)
                places[kind] = len(places)
            held = table.run_length(keys)
            holdings[name] = Holding(held, table.block_size, exchanges[name], places[kind])
        return LookUp(holdings, tuple((keys, kind[1]) for kind, keys in chains.items()))

    def exchanges(self, tables: Mapping[str, Table]) -> Mapping[str, frozenset[str]]:
        """For each replica, the others that it can import from. Worked out anew only when a table came, went or restarted."""
        stamp = tuple((name, table.epoch) for name, table in tables.items())
        if stamp != self._exchanges[0]:
            self._refused = {pair for pair in self._refused if set(pair) <= set(stamp)}
            fresh = {
                ours[0]: frozenset(
                    theirs[0]
                    for theirs in stamp
                    if theirs != ours
                    and (ours, theirs) not in self._refused
                    and not obstacles(tables[ours[0]], tables[theirs[0]])
                )
                for ours in stamp
            }
            self._exchanges = (stamp, fresh)
        return self._exchanges[1]

    def refused(self, taker: str, source: str) -> None:
        """The taker's engine said that it does not import from the source: so it is until one of the two is restarted."""
        ours, theirs = self._last.get(taker), self._last.get(source)
        if ours is not None and theirs is not None:
            self._refused.add(((taker, ours.epoch), (source, theirs.epoch)))
            self._exchanges = ((), {})

    def holders(self, keys: Keys) -> list[list[str]]:
        """For each key alone, who holds that block now. `keys` has shape (n, 2)."""
        found: list[list[str]] = [[] for _ in range(len(keys))]
        for name, table in sorted(self.tables().items()):
            for row, names in enumerate(found):
                if table.run_length(keys[row : row + 1]):
                    names.append(name)
        return found


def obstacles(ours: Table, theirs: Table) -> tuple[str, ...]:
    """Say in words why one replica can not import from another; empty if it can."""
    found = [f"it does not exchange: {table.status}" for table in (ours, theirs) if table.status != STATUS_OK]
    for what, here, there in (
        ("block size", ours.block_size, theirs.block_size),
        ("hash", ours.hash_name, theirs.hash_name),
        ("transport", ours.transport, theirs.transport),
    ):
        if here != there:
            found.append(f"{what}: {here} here, {there} there")
    if ours.fingerprint != theirs.fingerprint:
        found.extend(fingerprint_difference(ours.fingerprint_fields, theirs.fingerprint_fields))
    return tuple(dict.fromkeys(found))


def key_array(keys: Sequence[bytes]) -> Keys:
    """Return keys of 16 bytes each as an array of shape (n, 2)."""
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)
