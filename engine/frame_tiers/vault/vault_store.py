"""A Valkey server as a store of frames. One that is gone or slow costs a deadline, then nothing for a while: all is a miss."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TypeVar

from engine.frame_tiers.store import ID_BYTES, FrameId, StoreName, StoreRefused, StoreStats, Take
from engine.frame_tiers.vault.address import VaultAddress
from engine.frame_tiers.vault.connection import Connection, VaultLate
from engine.frame_tiers.vault.resp import Reply, VaultError, VaultGone

_logger = logging.getLogger("peerkv.vault")
_Result = TypeVar("_Result")

CONNECTIONS = 4
"""A fetch is spread over so many, each with one round trip."""
FETCH_FRAMES_MIN = 16
"""Fewer frames than this are not worth another connection."""
CALL_SECONDS = 5.0
"""The deadline of what nobody waits for: writing, flushing, asking how full it is."""
DOWN_SECONDS_MIN, DOWN_SECONDS_MAX = 1.0, 30.0
SLOW_SECONDS = 0.2
"""Who gives it less than this and gets no answer says nothing about the vault."""
PUT_BYTES = 8 << 20
"""Frames that are sent at once."""
LOOK_SECONDS = 10.0
LATELY_MAX = 65536
"""Frames of which is remembered that they are there."""
SCAN_KEYS = 1000
PREFIX = b"peerkv:1:"


class VaultStore:
    """Frames in the vault at `address`, each for `ttl_seconds` (0: until the server needs the room)."""

    name: StoreName = "vault"

    def __init__(
        self,
        address: VaultAddress,
        *,
        ttl_seconds: float = 0.0,
        call_seconds: float = CALL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._context = address.context()
        self._ttl_ms = int(ttl_seconds * 1000)
        self._call_seconds = call_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._closed = False
        self._down_until = 0.0
        self._down_seconds = DOWN_SECONDS_MIN
        self._why = ""
        self._looked_at = -LOOK_SECONDS
        self._stats = StoreStats("vault")
        self._lately: OrderedDict[FrameId, None] = OrderedDict()
        self._threads = ThreadPoolExecutor(2 * CONNECTIONS, thread_name_prefix="peerkv-vault")

    # What is there

    def stats(self) -> StoreStats:
        with self._lock:
            return replace(self._stats, state=self._why or "ok")

    def ready(self) -> bool:
        return self._clock() >= self._down_until

    def holds(self, ids: Sequence[FrameId], deadline: float) -> list[bool]:
        replies = self._call([[b"EXISTS", _key(each)] for each in ids], deadline)
        if replies is None:
            return [False] * len(ids)
        self._forget(each for each, reply in zip(ids, replies, strict=True) if reply == 0)
        return [reply == 1 for reply in replies]

    def knows(self, each: FrameId) -> bool:
        return each in self._lately

    def fetch(self, ids: Sequence[FrameId], take: Take, deadline: float) -> None:
        began = self._clock()
        parts = min(CONNECTIONS, max(1, len(ids) // FETCH_FRAMES_MIN))
        cuts = [len(ids) * part // parts for part in range(parts + 1)]
        jobs = [
            self._threads.submit(self._fetch, ids, cuts[part], cuts[part + 1], take, deadline)
            for part in range(parts)
            if cuts[part] < cuts[part + 1]
        ]
        wait(jobs)
        found = [job.result() for job in jobs]
        if sum(found):
            with self._lock:
                self._stats.read_seconds += self._clock() - began

    def _fetch(self, ids: Sequence[FrameId], first: int, last: int, take: Take, deadline: float) -> int:
        """Fetch a part of `ids`; return how many frames were good."""
        good: list[int] = []
        bad: list[FrameId] = []
        missing = set(range(first, last))

        def taken(place: int, frame: memoryview) -> None:
            missing.discard(first + place)
            if take(first + place, frame):
                good.append(len(frame))
            else:
                bad.append(ids[first + place])

        def ask(connection: Connection) -> bool:
            connection.fetch([_key(each) for each in ids[first:last]], taken, deadline)
            return True

        answered = self._with_connection(ask, deadline, lambda: bool(good or bad))
        if answered and missing:
            self._forget(ids[place] for place in missing)
        with self._lock:
            self._stats.found_frames += len(good)
            self._stats.found_bytes += sum(good)
            self._stats.damaged_frames += len(bad)
            self._stats.missed_frames += last - first - len(good) - len(bad)
        if bad:
            self.remove(bad)
        return len(good)

    # What changes it

    def put(self, frames: Sequence[tuple[FrameId, bytes]]) -> None:
        batch: list[tuple[FrameId, bytes]] = []
        size = 0
        for each, frame in frames:
            batch.append((each, frame))
            size += len(frame)
            if size >= PUT_BYTES:
                self._put(batch)
                batch, size = [], 0
        if batch:
            self._put(batch)

    def _put(self, batch: list[tuple[FrameId, bytes]]) -> None:
        deadline = self._deadline()
        there = self._call([[b"EXISTS", _key(each)] for each, _ in batch], deadline)
        if there is None:
            with self._lock:
                self._stats.dropped_frames += len(batch)
            return
        fresh = [entry for entry, known in zip(batch, there, strict=True) if known != 1]
        ttl = [b"PX", b"%d" % self._ttl_ms] if self._ttl_ms else []
        replies = self._call([[b"SET", _key(each), frame, *ttl] for each, frame in fresh], deadline) if fresh else []
        stored = [frame for (_, frame), reply in zip(fresh, replies or [], strict=False) if reply == b"OK"]
        refused = next((reply for reply in replies or [] if isinstance(reply, VaultError)), None)
        with self._lock:
            if not fresh or len(stored) == len(fresh):
                self._note(each for each, _ in batch)
            self._stats.stored_frames += len(stored)
            self._stats.stored_bytes += sum(map(len, stored))
            self._stats.dropped_frames += len(fresh) - len(stored)
            if refused is not None:  # full, and told to give nothing up
                self._stats.errors += 1
                self._why = f"taking nothing: {refused}"
            elif replies is not None:
                self._why = ""

    def _note(self, ids: Iterable[FrameId]) -> None:
        """Remember that these are there: what is given up there meanwhile is not sent again until it is missed."""
        for each in ids:
            self._lately[each] = None
            self._lately.move_to_end(each)
        while len(self._lately) > LATELY_MAX:
            self._lately.popitem(last=False)

    def _forget(self, ids: Iterable[FrameId]) -> None:
        """These are not there any more: they expired, or gave way, or the server began anew."""
        with self._lock:
            for each in ids:
                self._lately.pop(each, None)

    def remove(self, ids: Sequence[FrameId]) -> None:
        self._forget(ids)
        self._call([[b"UNLINK", *map(_key, ids)]], self._deadline())

    def each(self) -> Iterator[tuple[FrameId, int]]:
        """Yield every frame that is there, and its bytes. Raises StoreRefused if the vault does not answer."""
        for keys in self._scan():
            sizes = self._call([[b"STRLEN", key] for key in keys], self._deadline()) or []
            for key, size in zip(keys, sizes, strict=False):
                digits = key.removeprefix(PREFIX)
                if isinstance(size, int) and size and len(digits) == 2 * ID_BYTES:
                    yield bytes.fromhex(digits.decode()), size

    def _scan(self) -> Iterator[list[bytes]]:
        """Yield our keys, some at a time. Raises StoreRefused."""
        cursor = b"0"
        while True:
            found = self._call([[b"SCAN", cursor, b"MATCH", PREFIX + b"*", b"COUNT", b"%d" % SCAN_KEYS]], self._deadline())
            if found is None or isinstance(found[0], VaultError):
                raise StoreRefused(self._why or (str(found[0]) if found else "it does not answer"))
            cursor, keys = _scanned(found[0])
            if keys:
                yield keys
            if cursor == b"0":
                return

    def hold(self, pins: Sequence[Sequence[FrameId]]) -> None:
        """Nothing: which values give way is the server's own affair."""

    def flush(self) -> str:
        """Forget every frame in the vault's database, whichever node it is from."""
        with self._lock:
            self._lately.clear()
        try:
            for keys in self._scan():
                removed = self._call([[b"UNLINK", *keys]], self._deadline())
                if removed is None or isinstance(removed[0], VaultError):
                    return self._why or "it removed nothing"
        except StoreRefused as refused:
            return str(refused)
        self._looked_at = -LOOK_SECONDS
        return ""

    def tend(self) -> None:
        now = self._clock()
        if now - self._looked_at < LOOK_SECONDS or not self.ready():
            return
        self._looked_at = now
        told = self._call([[b"DBSIZE"], [b"INFO", b"memory"]], self._deadline())
        if told is not None and isinstance(told[0], int) and isinstance(told[1], bytes):
            memory = dict(line.split(":", 1) for line in told[1].decode("utf-8", "replace").splitlines() if ":" in line)
            with self._lock:
                self._stats.frames = told[0]
                self._stats.bytes = _number(memory.get("used_memory", ""))
                self._stats.bytes_max = _number(memory.get("maxmemory", ""))

    def close(self) -> None:
        self._threads.shutdown()
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
        for connection in idle:
            connection.close()

    # Inside

    def _deadline(self) -> float:
        return time.monotonic() + self._call_seconds

    def _call(self, commands: Sequence[Sequence[bytes]], deadline: float) -> list[Reply] | None:
        """Return the replies; None if the vault is gone, or was lately."""
        return self._with_connection(lambda connection: connection.call(commands, deadline), deadline)

    def _with_connection(
        self, do: Callable[[Connection], _Result], deadline: float, answers: Callable[[], bool] = lambda: False
    ) -> _Result | None:
        """Return what `do` does with a connection; None while the vault is down, if it is from now on, and if `do` was late.

        A call that had little time, or that `answers` says got a part in time, does not take the vault for down.
        """
        if not self.ready():
            return None
        connection: Connection | None = None
        began = time.monotonic()
        try:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                connection = Connection(self._address, self._context, deadline)
            result = do(connection)
        except (VaultGone, VaultError) as error:
            if connection is not None:
                connection.close()
            if isinstance(error, VaultLate) and (deadline - began < SLOW_SECONDS or answers()):
                with self._lock:
                    self._stats.errors += 1
            else:
                self._failed(str(error))
            return None
        self._give_back(connection)
        return result

    def _give_back(self, connection: Connection) -> None:
        with self._lock:
            self._down_seconds = DOWN_SECONDS_MIN
            if self._why.startswith("gone"):
                self._why = ""
                _logger.info("the vault %s is back", self._address.shown)
            if not self._closed and len(self._idle) < 2 * CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()

    def _failed(self, why: str) -> None:
        with self._lock:
            if not self._why.startswith("gone"):
                _logger.warning("the vault %s is not used for a while: %s", self._address.shown, why)
            self._why = f"gone: {why}"
            self._stats.errors += 1
            if self.ready():  # of calls side by side one is enough
                self._down_until = self._clock() + self._down_seconds
                self._down_seconds = min(2 * self._down_seconds, DOWN_SECONDS_MAX)
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


def _key(each: FrameId) -> bytes:
    return PREFIX + each.hex().encode()


def _scanned(reply: Reply) -> tuple[bytes, list[bytes]]:
    """The next cursor and the keys; the end if the answer is none."""
    if isinstance(reply, list) and len(reply) == 2 and isinstance(reply[0], bytes) and isinstance(reply[1], list):
        return reply[0], [key for key in reply[1] if isinstance(key, bytes)]
    return b"0", []


def _number(text: str) -> int:
    return int(text) if text.strip().isdigit() else 0
