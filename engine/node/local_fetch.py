"""Fetches blocks from other nodes for the engines of this one, into memory that they read.

An engine asks over a unix socket and holds the connection for as long as it needs the blocks; when it closes it, the memory is
free again, once the fetch itself has ended.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from engine.node.fetch_counts import FetchCounts
from engine.node.streams import end, receive, send
from engine.node.threads import in_thread
from transport.node.block_fetcher import BlockFetcher, Fetched
from transport.node.fetches import BEAT_SECONDS
from transport.node.messages import Beat, BlocksAsked, NodeError, Staged
from transport.node.names import node_of
from transport.node.staging import Piece, Staging
from transport.table.directory import TableDirectory
from transport.table.layout import Memory

_logger = logging.getLogger(__name__)

FETCHES_MAX = 16
"""Threads that fetch at once; a fetch beyond waits."""
PARTS_MAX = 4
PART_BYTES_MIN = 8 << 20
"""A fetch is cut into parts of at least so many bytes, which come over connections of their own."""
ASK_SECONDS = 5.0
HELD_SECONDS_MAX = 60.0
"""The longest time that an engine may hold what was fetched for it."""


@dataclass(frozen=True, slots=True)
class _Came:
    """What came of a fetch, the sizes of the blocks that did, bytes, and why others did not."""

    fetched: Fetched
    sizes: list[int]
    lost: Counter[str]


class LocalFetches:
    """Serves the node's engines; `client` finds the way to a node's blocks, None for a node that is not heard."""

    def __init__(self, tables: TableDirectory, staging: Staging, client: Callable[[str], BlockFetcher | None]) -> None:
        self._tables = tables
        self._staging = staging
        self._client = client
        self._threads = ThreadPoolExecutor(FETCHES_MAX, "peerkv-fetch")
        self.counts: defaultdict[str, FetchCounts] = defaultdict(FetchCounts)
        """By node."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one question, and keep its memory until the asker is done with it."""
        piece: Piece | None = None
        asked, began = None, time.monotonic()
        beating = asyncio.create_task(_beat(writer))
        try:
            asked = await receive(reader, ASK_SECONDS)
            if not isinstance(asked, BlocksAsked):
                raise NodeError("it asks for no blocks")
            client, piece, sizes = self._find(asked)
            # a thread that writes into the piece is waited for, even if the asker has left: only then is it free
            came = await asyncio.shield(self._fetch(client, asked, piece, sizes))
            self.counts[node_of(asked.name)].add(came.sizes, came.lost, time.monotonic() - began)
            asked, fetched = None, came.fetched
            if not fetched.good.any():
                raise NodeError(fetched.reason or "none of the blocks came")
            beating.cancel()
            await send(writer, Staged(piece.first, fetched.good.tobytes(), fetched.reason))
            async with asyncio.timeout(HELD_SECONDS_MAX):
                await reader.read(1)
        except NodeError as error:
            if isinstance(asked, BlocksAsked):  # nothing of it was counted
                lost: dict[str, int] = {error.loss: len(asked.ids) // 4}
                self.counts[node_of(asked.name)].add([], lost, time.monotonic() - began)
            _logger.info("a fetch failed: %s", error)
            beating.cancel()
            await _refuse(writer, str(error))
        except (OSError, TimeoutError) as error:
            _logger.debug("an engine left: %r", error)
        except asyncio.CancelledError:  # as the agent ends: asyncio (3.11) logs it as a defect otherwise
            _logger.debug("the agent ends")
        finally:
            beating.cancel()
            await end(writer)  # first: an engine that was slow sees by it that the memory is no longer its own
            if piece is not None:
                self._staging.give_back(piece)

    def close(self) -> None:
        """Take no more fetches."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _find(self, asked: BlocksAsked) -> tuple[BlockFetcher, Piece, list[int]]:
        """Return whom to ask, memory for the blocks, and the bytes of each block that is asked for."""
        client = self._client(node_of(asked.name))
        table = self._tables.tables().get(asked.name)
        if client is None or table is None or table.epoch != asked.epoch:
            raise NodeError(f"{asked.name} is not heard any more", "not_heard")
        memory = next((memory for memory in table.memories if memory.rank == asked.rank), None)
        if memory is None or not memory.layers:
            raise NodeError(f"{asked.name} has no memory for rank {asked.rank}")
        count, sizes = len(asked.ids) // 4, _sizes(asked, memory)
        piece = self._staging.take(count, memory.layers[0].stride)
        if piece is None or (asked.counts and len(piece.rows) < count):
            if piece is not None:
                self._staging.give_back(piece)
            raise NodeError("the memory for fetched blocks is full: raise --staging-memory", "no_room")
        return client, piece, sizes

    async def _fetch(self, client: BlockFetcher, asked: BlocksAsked, piece: Piece, sizes: list[int]) -> _Came:
        """Fetch all of it, over several connections if it is much."""
        count, asked_count = len(piece.rows), len(asked.ids) // 4
        parts = 1 if asked.counts else max(1, min(PARTS_MAX, piece.rows.size // PART_BYTES_MIN))
        cuts = [count * part // parts for part in range(parts + 1)]
        running = [
            in_thread(self._threads, client.fetch, _part(asked, begin, stop), sizes[begin:stop], piece.part(begin, stop))
            for begin, stop in itertools.pairwise(cuts)
        ]
        ended = await asyncio.gather(*running, return_exceptions=True)
        good: npt.NDArray[np.bool_] = np.zeros(asked_count, np.bool_)
        reasons = [] if count == asked_count else ["the memory for fetched blocks is full"]
        lost = Counter({"no_room": asked_count - count} if count < asked_count else {})
        for begin, stop, part in zip(cuts, cuts[1:], ended, strict=False):
            if isinstance(part, Fetched):
                good[begin : begin + len(part.good)] = part.good
                reasons += [part.reason] if part.reason else []
                lost[part.loss] += int((~part.good).sum())
            elif isinstance(part, NodeError):
                reasons.append(str(part))
                lost[part.loss] += stop - begin
            else:
                raise part
        reason = "; ".join(dict.fromkeys(reasons))
        return _Came(Fetched(good, reason), [sizes[place] for place in np.flatnonzero(good)], lost)


def _sizes(asked: BlocksAsked, memory: Memory) -> list[int]:
    """Return the bytes of each block that is asked for. Raises NodeError for counts that do not fit."""
    of_group: dict[int, int] = {}
    for layer in memory.layers:
        of_group[layer.group] = of_group.get(layer.group, 0) + layer.bytes
    count = len(asked.ids) // 4
    counts = asked.counts or (count,)
    if sum(counts) != count or min(counts) < 0:
        raise NodeError("counts of blocks that do not fit together")
    return [of_group.get(group, 0) for group, of_it in enumerate(counts) for _ in range(of_it)]


def _part(asked: BlocksAsked, begin: int, stop: int) -> BlocksAsked:
    name = asked.name.rpartition(":")[2]
    if asked.counts:
        return msgspec.structs.replace(asked, name=name)
    return msgspec.structs.replace(
        asked, name=name, ids=asked.ids[4 * begin : 4 * stop], states=asked.states[8 * begin : 8 * stop]
    )


async def _beat(writer: asyncio.StreamWriter) -> None:
    """Show the engine again and again that its agent is at work: it waits for no agent that is silent."""
    with contextlib.suppress(NodeError):  # it left, which whoever answers it sees
        while True:
            await send(writer, Beat(time.monotonic_ns()))
            await asyncio.sleep(BEAT_SECONDS)


async def _refuse(writer: asyncio.StreamWriter, reason: str) -> None:
    try:
        await send(writer, Staged(0, b"", reason))
    except NodeError as error:
        _logger.debug("an engine left: %s", error)
