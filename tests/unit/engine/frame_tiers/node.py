"""A replica's host memory, filled by hand, and the ways down and up beside it."""

import os
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from engine.frame_tiers.demotion import Demotion
from engine.frame_tiers.messages import Promote
from engine.frame_tiers.models import Models
from engine.frame_tiers.promotion import Promotion
from engine.frame_tiers.secrecy import OPEN
from engine.frame_tiers.writing import Writer
from engine.tiers.slots import cut
from tests.unit.engine.keeper import Keeper
from transport.backends.shared_memory import checksum, map_region
from transport.fingerprint import fingerprint_digest
from transport.frames import slot_codes
from transport.groups import Group, unit
from transport.keys import chain_keys, group_keys, root_key
from transport.table.kept_table import KeptTable
from transport.table.layout import CHECKSUM_BYTES, Description, Layer, Memory
from transport.table.quality import IN_CODE
from transport.table.reader import TableReader
from transport.table.tiers import host_memory_of

SIZE = 4
FIELDS = {"weights": "w1", "strides": "torch.bfloat16 (2, 8) (16, 1)"}
PLAIN = ((Group("full", SIZE), (64, 64)),)
HYBRID = ((Group("full", SIZE), (64, 64)), (Group("state", SIZE), (200, 40)))
TOKENS = list(range(1000, 1000 + 16 * SIZE))


def layers(groups):
    return tuple(Layer(0, 0, size, size, number) for number, (_, sizes) in enumerate(groups) for size in sizes)


def content(key: bytes, rank: int, size: int):
    return np.random.default_rng(np.frombuffer(key, np.uint64) + rank).integers(0, 256, size, np.uint8)


class HostMemory:
    """The host memory of one replica: blocks are put there under the keys of `chain`."""

    def __init__(
        self, path: Path, name="replica-0", groups=PLAIN, ranks=1, size=1 << 16, fields=FIELDS, shape=None, codec="int8"
    ):
        self.groups, self.ranks = groups, ranks
        self.fields = fields
        self.keeper = Keeper(path)
        kept = self.keeper.keep(name, size)
        self.shape, self.codec = shape, codec
        slots = [
            cut(kept.region, Memory(rank, "shared_memory", (), layers(groups)), ranks, shape, codec) for rank in range(ranks)
        ]
        self.memories = tuple(each.memory for each in slots)
        kinds = tuple(group for group, _ in groups)
        about = Description(host_memory_of(name), os.getpid(), "xxh3_128", "shared_memory", "ok", fields, self.memories, kinds)
        self.table_description = about
        self.table = KeptTable(path, about, unit(kinds), slots[0].count, Path(kept.draft))
        self.map = map_region(kept.region, writable=True)
        self.chain = chain_keys(root_key(fingerprint_digest(fields)), TOKENS, SIZE)

    def keys(self, group=0):
        return group_keys(self.chain, group)

    def put(self, places, group=0, slot=0, quality=0):
        """Store the blocks of these places of the chain, from `slot` on, with these bits of transport/table/quality.py."""
        for number, place in enumerate(places, slot):
            key = self.keys(group)[place]
            self.table.invalidate([number])
            for rank in range(self.ranks):
                if quality & IN_CODE:
                    self._write_coded(rank, number, key.tobytes())
                else:
                    self._write(rank, number, key.tobytes(), group)
            self.table.publish([number], key.reshape(1, 2), quality)

    def _write(self, rank, slot, key, group):
        memory = self.memories[rank]
        own = [layer for layer in memory.layers if layer.group == group]
        size = sum(layer.bytes for layer in own)
        data = content(key, rank, size)
        begin = own[0].offset + slot * own[0].stride
        self.map[begin : begin + size] = data.tobytes()
        said = memory.checksums.offset + slot * memory.checksums.stride
        self.map[said : said + CHECKSUM_BYTES] = checksum(data.data, key)

    def _write_coded(self, rank, slot, key):
        about = self.memories[rank].coded
        code = slot_codes.encode(self.codec, content(key, rank, self.shape.nbytes), self.shape)
        begin = about.offset + slot * about.stride
        self.map[begin : begin + about.bytes] = code
        self.map[begin + about.checksum : begin + about.checksum + CHECKSUM_BYTES] = checksum(code, key)

    def offset(self, slot):
        """Where a slot's block begins on the first rank."""
        return self.memories[0].layers[0].offset + slot * self.memories[0].layers[0].stride


class Node:
    """The frame tiers of a node, without their process: `stores` are the nearest first."""

    def __init__(self, path: Path, *stores, staging_bytes=1 << 16, codec="raw-z", secrecy=OPEN, lossy=""):
        self.path = path
        self.models = Models(secrecy)
        self.writers = [Writer(store) for store in stores]
        self.demotion = Demotion(path, self.models, lambda: self.writers, codec, lossy)
        self.promotion = Promotion(path, self.models, lambda: [w.store for w in self.writers], staging_bytes)

    def down(self) -> int:
        """Write what is new in host memory."""
        found = self.demotion.look()
        deadline = time.monotonic() + 20
        while not all(writer.drained() for writer in self.writers):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return found

    def up(self, memory, tokens=None, begin=0, seconds=10.0):
        """Ask for the first `tokens` of the chain."""
        keys = memory.chain[: None if tokens is None else tokens // SIZE]
        return self.promote(Promote(1, fingerprint_digest(memory.fields), keys.tobytes(), begin, seconds))

    def promote(self, ask):
        """Ask at once: nobody waits for its turn."""
        return self.promotion.promote(ask, time.monotonic() + ask.seconds)

    def staged(self, memory, name="disk", group=0):
        """The places of the chain whose blocks are offered under `name`, each compared to the last bit."""
        path = self.path / f"{name}.table"
        if not path.exists():
            return []
        with closing(TableReader(path)) as reader:
            held, slots, _ = reader.look_up(memory.keys(group))
            for place in np.flatnonzero(held):
                for rank in range(memory.ranks):
                    compare(reader, rank, int(slots[place]), memory.keys(group)[place].tobytes(), group)
            return np.flatnonzero(held).tolist()

    def close(self):
        self.demotion.close()
        for writer in self.writers:
            writer.close(5.0)
        self.promotion.close()


def compare(reader, rank, slot, key, group):
    memory = next(each for each in reader.memories if each.rank == rank)
    own = [layer for layer in memory.layers if layer.group == group]
    size = sum(layer.bytes for layer in own)
    begin, said = own[0].offset + slot * own[0].stride, memory.checksums.offset + slot * memory.checksums.stride
    with closing(map_region(memory.regions[0])) as mapped:
        assert mapped[begin : begin + size] == content(key, rank, size).tobytes()
        assert mapped[said : said + CHECKSUM_BYTES] == checksum(memoryview(mapped[begin : begin + size]), key)
