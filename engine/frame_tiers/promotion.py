"""The way up: the frames of a prompt's chain are read, checked, decoded into staging, and offered there."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from engine.frame_tiers.messages import Promote, Promoted
from engine.frame_tiers.model_frames import ModelFrames
from engine.frame_tiers.models import Models
from engine.frame_tiers.staging import Staging
from engine.frame_tiers.store import FrameStore
from engine.tiers.slots import NoSlots
from transport.errors import TransportError
from transport.frames.codec import Quality
from transport.frames.errors import FrameError
from transport.frames.frame import read_header, read_into
from transport.groups import needed, supplied
from transport.keys import KEY_BYTES, as_keys
from transport.table.group_look_up import GroupChain
from transport.table.quality import CODED, LOSSY
from transport.table.tiers import staged_from

_logger = logging.getLogger("peerkv.tiers")

BLOCKS_MAX = 1 << 17
"""Blocks of a longer prompt are not looked for."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A block that a prompt lacks."""

    key: bytes
    group: int


@dataclass(slots=True)
class _Landing:
    """Blocks under way into `staging`: the places in `wanted` that are `missing`, and the slots of those that arrive.

    `clears` is how often the staging had been cleared before any of them was read; `lossy`: frames with loss are taken, and
    `coded` are the places that had one.
    """

    staging: Staging
    wanted: Sequence[_Wanted]
    keys: frozenset[bytes]
    missing: set[int]
    clears: int
    lossy: bool
    slots: dict[int, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    coded: set[int] = field(default_factory=set)
    bytes: int = 0
    frames: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def slot(self, place: int) -> int | None:
        """Return where a block goes; None if there is no room."""
        with self.lock:
            found = self.slots.get(place)
            if found is None:
                found = self.staging.reserve(self.keys)
                if found is not None:
                    self.slots[place] = found
            return found

    def arrived(self, place: int, size: int, ranks: int, quality: Quality) -> bool:
        """Note a frame; whether all ranks' are there now."""
        with self.lock:
            if quality is Quality.LOSSY:
                self.coded.add(place)
            self.bytes += size
            self.frames += 1
            self.ranks[place] = self.ranks.get(place, 0) + 1
            return self.ranks[place] == ranks


class Promotion:
    """Brings chains up from `stores()`, the nearest first, into stagings of `staging_bytes` each. Thread safe."""

    def __init__(self, table_dir: Path, models: Models, stores: Callable[[], Sequence[FrameStore]], staging_bytes: int) -> None:
        self._table_dir = table_dir
        self._models = models
        self._stores = stores
        self._staging_bytes = staging_bytes
        self._lock = threading.Lock()
        self._stagings: dict[tuple[bytes, str], Staging] = {}
        self._refused: dict[tuple[bytes, str], str] = {}
        self.promoted = self.late = self.staged = 0

    def promote(self, ask: Promote, deadline: float) -> Promoted:
        """Do what is asked, and return what came of it; `deadline` on time.monotonic, since it may have waited for its turn."""
        began = time.monotonic()
        model = self._models.find(ask.fingerprint)
        if model is None or not ask.keys or len(ask.keys) % KEY_BYTES or len(ask.keys) > BLOCKS_MAX * KEY_BYTES:
            return Promoted(ask.id, why="no such model is served here" if model is None else "no chain")
        chain = GroupChain(model.groups, as_keys(ask.keys))
        begin = ask.begin // model.block_size * model.block_size
        found = self._promote(model, chain, begin, deadline, lossy=ask.lossy) if began < deadline else Promoted(ask.id)
        late = time.monotonic() > deadline
        with self._lock:
            self.promoted += bool(found.source)
            self.late += late
        if late and not found.source:
            found = msgspec.structs.replace(found, why="not in time")
        return msgspec.structs.replace(found, id=ask.id, seconds=time.monotonic() - began)

    def _promote(self, model: ModelFrames, chain: GroupChain, begin: int, deadline: float, *, lossy: bool) -> Promoted:
        """Bring up what the nearest stores have that reach the end between them; if none do, what all have, or fewer."""
        stores = self._stores()
        reaches = [begin]
        for count in range(1, len(stores) + 1):
            reach, certain = self._reach(model, chain, begin, stores[:count], deadline)
            reaches.append(reach if certain else begin)
            if certain and reach >= chain.tokens:
                found = self._bring(model, chain, begin, reach, stores[:count], deadline, lossy=lossy)
                if found.source:
                    return found
        found = Promoted(0, why="not stored")
        for count in range(len(stores), 0, -1):
            end = reaches[count] if reaches[count] > begin else chain.tokens
            if (reaches[count] > reaches[count - 1] or self._unasked(model, stores[:count])) and not found.source:
                found = self._bring(model, chain, begin, end, stores[:count], deadline, lossy=lossy)
        return found

    def clear(self) -> None:
        """Withdraw everything that was brought up."""
        with self._lock:
            stagings = list(self._stagings.values())
        for staging in stagings:
            staging.clear()

    def close(self) -> None:
        """End the tables."""
        with self._lock:
            for staging in self._stagings.values():
                staging.close()

    def _bring(
        self,
        model: ModelFrames,
        chain: GroupChain,
        begin: int,
        end: int,
        stores: Sequence[FrameStore],
        deadline: float,
        *,
        lossy: bool,
    ) -> Promoted:
        """Bring up what `stores` have between them, into the staging of the last of them, without which less would come."""
        last = stores[-1]
        staging = self._staging(model, last)
        if isinstance(staging, str):
            return Promoted(0, why=staging)
        wanted = self._wanted(model, chain, begin, end)
        if len(wanted) > staging.slots:
            if not model.plain:
                return Promoted(0, why="it is larger than the memory that it would come up into")
            wanted = wanted[: staging.slots]
        keys, clears = [each.key for each in wanted], staging.clears
        landing = _Landing(staging, wanted, frozenset(keys), set(staging.missing(keys)), clears, lossy)
        try:
            self._fetch_all(model, stores, landing, deadline)
        finally:
            staging.release(landing.slots.values())
        missing = staging.missing(keys)
        if model.plain:
            end = begin + (missing[0] if missing else len(wanted)) * model.block_size
        elif missing:
            end = begin
        if end <= begin:
            return Promoted(0, why="not stored")
        return Promoted(0, staging.name, end, landing.frames, landing.bytes)

    def _fetch_all(self, model: ModelFrames, stores: Sequence[FrameStore], landing: _Landing, deadline: float) -> None:
        """Fetch from the farthest store what the others lack; where the first of that is not there, the rest is of no use."""
        ranks = len(model.ranks)
        left, shares = sorted(landing.missing), []
        for store in stores[:-1]:
            ids = [each for place in left for each in model.ids(landing.wanted[place].key)]
            holds = store.holds(ids, deadline)
            own = [place for at, place in enumerate(left) if all(holds[at * ranks : (at + 1) * ranks])]
            shares.append((store, own))
            left = sorted(set(left).difference(own))
        for store, own in [(stores[-1], left), *shares]:
            if own:
                self._fetch(model, store, landing, own, deadline)
                if own[0] in landing.missing:
                    return

    def _reach(
        self, model: ModelFrames, chain: GroupChain, begin: int, stores: Sequence[FrameStore], deadline: float
    ) -> tuple[int, bool]:
        """Return how far the stores reach together, and whether that is certain.

        A vault is not asked what it holds where all blocks of a prefix are needed: asking for the frames takes one round trip.
        """
        if self._unasked(model, stores):
            return chain.tokens, False
        held = _Held(model, chain, stores, deadline)
        return supplied(model.groups, held, begin, chain.tokens), True

    def _unasked(self, model: ModelFrames, stores: Sequence[FrameStore]) -> bool:
        return model.plain and stores[-1].name == "vault"

    def _wanted(self, model: ModelFrames, chain: GroupChain, begin: int, end: int) -> list[_Wanted]:
        found = []
        for number, group in enumerate(model.groups):
            blocks = needed(group, begin, end)
            found += [_Wanted(bytes(key), number) for key in chain.keys(number)[blocks.start : blocks.stop]]
        return found

    def _fetch(self, model: ModelFrames, store: FrameStore, landing: _Landing, own: Sequence[int], deadline: float) -> None:
        ranks = len(model.ranks)
        ids = [each for place in own for each in model.ids(landing.wanted[place].key)]
        store.fetch(ids, lambda at, frame: self._land(model, landing, own[at // ranks], at % ranks, frame), deadline)

    def _land(self, model: ModelFrames, landing: _Landing, place: int, rank: int, frame: memoryview) -> bool:
        """Decode a frame to where it belongs; offer the block once every rank's is there. False for a frame that is no good."""
        wanted, slot = landing.wanted[place], landing.slot(place)
        if slot is None:
            return True
        out = landing.staging.target(slot, rank, wanted.group)
        try:
            quality = decode(model, wanted.key, wanted.group, rank, frame, out, lossy=landing.lossy)
        except FrameError as error:
            _logger.info("a frame is not used: %s", error)
            return False
        if landing.arrived(place, len(frame), len(model.ranks), quality):
            bits = (LOSSY if landing.lossy else 0) | (CODED if place in landing.coded else 0)
            landing.staging.publish(slot, wanted.key, wanted.group, landing.clears, bits)
            with landing.lock:
                del landing.slots[place]
                landing.missing.discard(place)
            with self._lock:
                self.staged += 1
        return True

    def _staging(self, model: ModelFrames, store: FrameStore) -> Staging | str:
        """Return the staging of a model for a store, or why there is none."""
        key = (model.fingerprint, store.name)
        with self._lock:
            if key in self._refused:
                return self._refused[key]
            known = self._stagings.get(key)
            if known is None:
                number = sum(name == store.name for _, name in self._stagings)
                try:
                    known = Staging(self._table_dir, staged_from(store.name, number), model, self._staging_bytes)
                except (NoSlots, TransportError, OSError) as error:
                    self._refused[key] = f"nothing comes up from {store.name}: {error}"
                    _logger.warning("%s", self._refused[key])
                    return self._refused[key]
                self._stagings[key] = known
            return known


class _Held:
    """What stores hold of a chain between them: a Holder of transport.groups."""

    def __init__(self, model: ModelFrames, chain: GroupChain, stores: Sequence[FrameStore], deadline: float) -> None:
        ranks = len(model.ranks)
        self._groups: list[Any] = []
        for number in range(len(model.groups)):
            ids = model.all_ids(chain.keys(number))
            held = np.zeros(len(ids), np.bool_)
            for store in stores:
                held |= np.array(store.holds(ids, deadline), np.bool_)
            self._groups.append(np.all(held.reshape(-1, ranks), axis=1))

    def run_end(self, group: int, begin: int, end: int) -> int:
        missing = np.flatnonzero(~self._groups[group][begin:end])
        return begin + int(missing[0]) if len(missing) else end

    def last_missing(self, group: int, begin: int, end: int) -> int:
        missing = np.flatnonzero(~self._groups[group][begin:end])
        return begin + int(missing[-1]) if len(missing) else -1

    def last_held(self, group: int, begin: int, end: int) -> int:
        held = np.flatnonzero(self._groups[group][begin:end])
        return begin + int(held[-1]) if len(held) else -1


def decode(
    model: ModelFrames, key: bytes, group: int, rank: int, frame: memoryview, out: npt.NDArray[np.uint8], *, lossy: bool = False
) -> Quality:
    """Decode a frame into `out` and return its class. Raises FrameError for any other than this block's.

    One with loss is only taken if `lossy`: under the key of a caller who accepts that.
    """
    framed = model.framed_group(group)
    header, shape = read_header(frame), model.shapes[framed]
    if header.quality is Quality.LOSSY and not lossy:
        raise FrameError("a frame with loss, where exact ones are kept")
    if header.codec.quality is Quality.LOSSY:
        told = model.coded_shapes[framed]
        if told is None:
            raise FrameError("a frame of a codec with loss, which takes no such blocks")
        shape = told
    secret = model.secrecy.key_of(header.tenant)
    read_into(out, frame, fingerprint=model.ranks[rank], key=key, shape=shape, group=framed, secret=secret)
    return header.quality
