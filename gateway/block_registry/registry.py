"""What the block tables say about a request: who holds how much of its prefix, and who can import from whom."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec
import numpy as np

from gateway.block_registry.chain import Chain
from gateway.block_registry.chain_cache import ChainCache
from gateway.block_registry.lifetime_counters import LifetimeCounters
from gateway.block_registry.tables import Table, Tables
from gateway.token_ids import TokenIds
from transport.fingerprint import fingerprint_difference
from transport.groups import Group, plain
from transport.keys import HASHES, Keys, root_key
from transport.table.prefix import GroupChain, held_tokens

STATUS_OK = "ok"
KEY_CACHE_BYTES_MAX = 32 << 20


ROOTS_MAX = 4096
_root_key = lru_cache(maxsize=ROOTS_MAX)(root_key)


class LookUp(msgspec.Struct, frozen=True):
    """What the tables say about a prompt: how many leading blocks each replica holds; those without any are omitted.

    `chains` are those that were looked up, with block sizes, `places` tells which of them is a replica's, for each with a live
    table whose hash is known; `held_tokens_max` are the tokens that somebody holds. `divisible`: of what is held any leading
    part can be supplied too, which windows and states do not allow.
    """

    blocks: Mapping[str, int]
    places: Mapping[str, int]
    chains: tuple[tuple[Chain, int], ...]
    held_tokens_max: int
    divisible: bool = True


NOTHING = LookUp({}, {}, (), 0)


class _Kind(NamedTuple):
    """Tables in which the same chain is looked up."""

    fingerprint: bytes
    block_size: int
    hash_name: str
    groups: tuple[Group, ...]
    plain: bool
    tables: dict[str, Table]


class Registry:
    """A view over the live tables. Belongs to one thread, as the directory does."""

    def __init__(self, directory: Tables, key_cache_bytes_max: int = KEY_CACHE_BYTES_MAX) -> None:
        self._directory = directory
        self._chains = ChainCache(key_cache_bytes_max)
        self.ledger = LifetimeCounters()
        self._last: Mapping[str, Table] = {}
        self._exchanges: tuple[tuple[tuple[str, int], ...], dict[str, frozenset[str]]] = ((), {})
        self._refused: set[tuple[tuple[str, int], tuple[str, int]]] = set()
        self._exchanging: Mapping[str, Table] | None = None
        self._kinds: tuple[Mapping[str, Table], list[_Kind], Mapping[str, int]] = ({}, [], {})

    def tables(self) -> Mapping[str, Table]:
        """Return the live tables by replica name; their counters go into the ledger. The same object while none changes."""
        found = self._directory.tables()
        if found != self._last:
            self._last = dict(found)
            self.ledger.observe(self._last)
        return self._last

    def table(self, name: str) -> Table | None:
        """Return one replica's table as `tables` last had it, at no cost; its owner may have died since."""
        return self._last.get(name)

    def look_up(self, ids: Sequence[int], salt: str = "", lora: str = "", tables: Mapping[str, Table] | None = None) -> LookUp:
        """Find out who holds how much of a prompt. The chain is hashed once per distinct fingerprint, block size and hash.

        The last token is always computed, so a block that ends with it does not count. `tables` are those to look in, if the
        caller has just asked for them.
        """
        if not isinstance(ids, TokenIds):
            ids = TokenIds.of(ids)
        if tables is None:
            tables = self.tables()
        former, kinds, places = self._kinds
        if former is not tables:
            kinds, places = self._sort(tables)
        tokens = max(0, len(ids) - 1)
        chains: list[tuple[Chain, int]] = []
        blocks: dict[str, int] = {}
        most = 0
        divisible = True
        for kind in kinds:
            block_size = kind.block_size
            root = _root_key(kind.fingerprint, salt, lora, kind.hash_name)
            chain = self._chains.chain(root, ids, tokens // block_size, block_size, kind.hash_name)
            chains.append((chain, block_size))
            if not chain.blocks:
                continue
            words = chain.words
            groups = None if kind.plain else GroupChain(kind.groups, chain.keys)
            for name, table in kind.tables.items():
                held = table.held_blocks(words) if groups is None else held_tokens(table, groups) // block_size
                if held:
                    blocks[name] = held
                    divisible = divisible and kind.plain
                    if held * block_size > most:
                        most = held * block_size
        return LookUp(blocks, places, tuple(chains), most, divisible)

    def _sort(self, tables: Mapping[str, Table]) -> tuple[list[_Kind], Mapping[str, int]]:
        """Return the tables by what their chains are made of, and the place of each one's kind."""
        by_chain: dict[tuple[bytes, int, str], _Kind] = {}
        for name, table in tables.items():
            if table.hash_name not in HASHES:  # from a later version, or damaged: we have no names for its blocks
                continue
            key = (table.fingerprint, table.block_size, table.hash_name)
            by_chain.setdefault(key, _Kind(*key, table.groups, plain(table.groups), {})).tables[name] = table
        kinds = list(by_chain.values())
        self._kinds = (tables, kinds, {name: place for place, kind in enumerate(kinds) for name in kind.tables})
        return kinds, self._kinds[2]

    def exchanges(self, tables: Mapping[str, Table]) -> Mapping[str, frozenset[str]]:
        """Return, for each replica, the others that it can import from. Recomputed only when tables change."""
        if tables is self._exchanging:
            return self._exchanges[1]
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
        if tables is self._last:  # which is never changed
            self._exchanging = tables
        return self._exchanges[1]

    def refused(self, taker: str, source: str) -> None:
        """Record that the taker's engine refuses to import from the source, until one of the two is restarted."""
        ours, theirs = self._last.get(taker), self._last.get(source)
        if ours is not None and theirs is not None:
            self._refused.add(((taker, ours.epoch), (source, theirs.epoch)))
            self._exchanges, self._exchanging = ((), {}), None

    def holders(self, keys: Keys) -> list[list[str]]:
        """Return, for each key by itself, who holds that block now. `keys` has shape (n, 2)."""
        found: list[list[str]] = [[] for _ in range(len(keys))]
        words = Chain.of(keys).words
        for name, table in sorted(self.tables().items()):
            for row, names in enumerate(found):
                if table.holds(words[2 * row], words[2 * row + 1]):
                    names.append(name)
        return found


def obstacles(ours: Table, theirs: Table) -> tuple[str, ...]:
    """Say why one replica cannot import from another; empty if it can."""
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
