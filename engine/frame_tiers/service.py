"""The process of the frame tiers: opens the stores, moves blocks down by itself, and up when a gateway asks."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from engine.frame_tiers.config import TierConfig, open_store
from engine.frame_tiers.demotion import Demotion
from engine.frame_tiers.messages import (
    LENGTH,
    MESSAGE_BYTES_MAX,
    Answer,
    Ask,
    Flush,
    Flushed,
    Pin,
    Promote,
    Promoted,
    TierStats,
    Unpin,
    decode_ask,
    encode,
)
from engine.frame_tiers.models import Models
from engine.frame_tiers.pinned import PinnedPrefixes
from engine.frame_tiers.promotion import Promotion
from engine.frame_tiers.secrecy import OPEN, read_secret
from engine.frame_tiers.self_test import self_test
from engine.frame_tiers.standing import OPENING
from engine.frame_tiers.store import FrameStore, StoreName, StoreRefused, StoreStats
from engine.frame_tiers.writing import Writer
from transport.frames.codecs import compile_codec

_logger = logging.getLogger("peerkv.tiers")

RETRY_SECONDS = 10.0
"""A store that cannot be used is tried again after so long."""
TELL_SECONDS = 1.0
PINS_GATHERED_SECONDS = 0.05
"""A gateway that connects tells all its pins at once: they are looked through together."""
PROMOTIONS_MAX = 8
"""Prompts that are brought up at once; others wait, and are given up when their time is over."""
CLOSE_SECONDS_MAX = 3.0


class Service:
    """Everything of one node. Belongs to one event loop. Raises SecretRefused."""

    def __init__(self, config: TierConfig) -> None:
        self._config = config
        self._models = Models(read_secret(Path(config.secret_file)) if config.secret_file else OPEN)
        self._pinned = PinnedPrefixes()
        self._writers: tuple[Writer, ...] = ()
        self._words: dict[StoreName, str] = dict.fromkeys(config.stores, OPENING.removeprefix("off: "))
        table_dir = Path(config.table_dir)
        self._demotion = Demotion(table_dir, self._models, lambda: self._writers, config.codec, config.lossy)
        self._promotion = Promotion(table_dir, self._models, self._stores, config.staging_bytes)
        self._threads = ThreadPoolExecutor(PROMOTIONS_MAX, thread_name_prefix="peerkv-promotion")
        self._under_way: dict[tuple[bytes, bytes, int], asyncio.Future[Promoted]] = {}
        self._gateways: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until cancelled; what is queued is written then."""
        socket = self._config.socket
        _remove(socket)
        former = os.umask(0o077)
        try:
            server = await asyncio.start_unix_server(self._serve, socket)
        finally:
            os.umask(former)
        self._demotion.start()
        try:
            await asyncio.gather(self._keep_open(), self._tell())
        finally:
            server.close()  # not waited for: from Python 3.12 on that ends when all gateways have left
            _remove(socket)
            self._close()

    def _close(self) -> None:
        self._demotion.close()
        for writer in self._writers:
            writer.close(CLOSE_SECONDS_MAX)
        self._threads.shutdown(cancel_futures=True)
        self._promotion.close()

    def _stores(self) -> Sequence[FrameStore]:
        return [writer.store for writer in self._writers]

    # The stores

    async def _keep_open(self) -> None:
        """Open each store, and try again those that cannot be used."""
        if self._config.lossy:
            await asyncio.to_thread(compile_codec, self._config.lossy)
        while True:
            for name in self._config.stores:
                if name in self._words:
                    await asyncio.to_thread(self._open, name)
            await asyncio.sleep(RETRY_SECONDS)

    def _open(self, name: StoreName) -> None:
        before = self._words[name]
        try:
            store = open_store(self._config, name)
        except StoreRefused as refused:
            self._words[name] = str(refused)
        else:
            wrong = self_test(store)
            if not wrong:
                found = (*self._writers, Writer(store))
                self._writers = tuple(sorted(found, key=lambda each: self._config.stores.index(each.store.name)))
                del self._words[name]
                self._pinned.changed = True
                _logger.info("%s is in use", name)
                return
            store.close()
            self._words[name] = f"failed its self-test: {wrong}"
        if self._words[name] != before:
            _logger.warning("%s is not used: %s", name, self._words[name])

    def stats(self) -> TierStats:
        """Return all figures."""
        found = []
        for name in self._config.stores:
            writer = next((each for each in self._writers if each.store.name == name), None)
            if writer is None:
                found.append(StoreStats(name, state=f"off: {self._words.get(name, '')}"))
                continue
            counts = writer.store.stats()
            counts.dropped_frames += writer.dropped
            found.append(counts)
        up = self._promotion
        down = self._demotion
        return TierStats(tuple(found), down.lost, down.unknown, up.promoted, up.late, up.staged, os.getpid())

    # The gateways

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(TELL_SECONDS)
            self._pinned.expire(time.monotonic())
            self._hold()
            line = encode(self.stats())
            for gateway in list(self._gateways):
                if gateway.transport.get_write_buffer_size() < MESSAGE_BYTES_MAX:
                    gateway.write(line)

    def _hold(self) -> None:
        """Have the stores keep what is pinned."""
        if self._pinned.due(self._models):
            pins = self._pinned.frames(self._models)
            for writer in self._writers:
                writer.store.hold(pins)

    async def _serve(self, reader: asyncio.StreamReader, gateway: asyncio.StreamWriter) -> None:
        self._gateways.add(gateway)
        gateway.write(encode(self.stats()))
        try:
            while True:
                (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                if size > MESSAGE_BYTES_MAX:
                    return
                ask = decode_ask(await reader.readexactly(size))
                task = asyncio.create_task(self._answer(ask, gateway))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        except (asyncio.IncompleteReadError, OSError, msgspec.MsgspecError):  # it left, or is none of ours
            return
        finally:
            self._gateways.discard(gateway)
            gateway.close()
            with contextlib.suppress(OSError):
                await gateway.wait_closed()

    async def _answer(self, ask: Ask, gateway: asyncio.StreamWriter) -> None:
        answer: Answer
        match ask:
            case Promote():
                found = await self._promote(ask)
                answer = msgspec.structs.replace(found, id=ask.id)
            case Flush(number):
                self._pinned.clear()
                self._hold()
                answer = Flushed(number, await asyncio.get_running_loop().run_in_executor(None, self.flush))
            case Pin():
                self._pinned.add(ask, time.monotonic())
                asyncio.get_running_loop().call_later(PINS_GATHERED_SECONDS, self._hold)
                return
            case Unpin(number):
                self._pinned.remove(number)
                asyncio.get_running_loop().call_later(PINS_GATHERED_SECONDS, self._hold)
                return
        with contextlib.suppress(OSError):
            gateway.write(encode(answer))
            await gateway.drain()

    async def _promote(self, ask: Promote) -> Promoted:
        """Bring a prompt up, once for all that ask for the same at the same time."""
        key = (ask.fingerprint, ask.keys[-16:], ask.begin)
        known = self._under_way.get(key)
        if known is None:
            loop, deadline = asyncio.get_running_loop(), time.monotonic() + ask.seconds
            known = self._under_way[key] = loop.run_in_executor(self._threads, self._promotion.promote, ask, deadline)
            known.add_done_callback(lambda _: self._under_way.pop(key, None))
        try:
            return await asyncio.shield(known)
        except Exception as error:  # noqa: BLE001 - whatever it is, this prompt is computed
            _logger.error("a prompt is not brought up: %r", error)
            return Promoted(ask.id, why="an error; the log has it")

    def flush(self) -> dict[str, str]:
        """Forget everything, what is under way too; return why each store failed to, "" if it did not."""
        self._demotion.forget()
        self._promotion.clear()
        words = dict(self._words)  # a store may come into use meanwhile
        found: dict[str, str] = {name: f"it is not in use: {why}" for name, why in words.items()}
        for writer in self._writers:
            found[writer.store.name] = writer.flush()
        self._promotion.clear()
        return found


def _remove(socket: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(socket)
