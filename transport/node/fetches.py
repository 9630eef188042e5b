"""How an engine's worker imports from another node: its own node's agent fetches the blocks, and they are copied from there.

Nothing here waits: `begin` asks, `poll` sees what was answered. The copy into the engine's KV memory is an ordinary import out
of the agent's memory, with what the agent says of each block in the place of a table's states.
"""

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from transport.backends.base import ImportJob, JobId
from transport.node.messages import LENGTH_BYTES, Beat, BlocksAsked, Message, NodeError, Staged, body_bytes, decode, encode
from transport.table.layout import Memory
from transport.table.reader import TableReader

SOCKET = "node.sock"
"""Where an agent listens for the engines of its node, in the directory of the tables."""
FETCH_SECONDS_MAX = 20.0
"""However much came until then: the rest is computed."""
BEAT_SECONDS = 0.25
"""An agent that is at work on a fetch says so as often."""
SILENT_SECONDS = 2.0
"""An agent that says nothing for so long is stopped, or stuck: it is not waited for."""
READ_BYTES = 1 << 16
_PEER = struct.Struct("=3i")
"""What the kernel says of a peer: process, user, group."""


class StagedReader:
    """Blocks that an agent fetched, as a table's reader: slots for blocks, and what it said of each for their states."""

    def __init__(
        self,
        reader: TableReader,
        memory: Memory,
        good: npt.NDArray[np.bool_],
        slots: int,
        connection: socket.socket | None = None,
    ) -> None:
        self.name = reader.name
        self.epoch = reader.epoch
        self.num_blocks = slots
        self.memories = (memory,)
        self._good = good
        self._connection = connection

    def alive(self) -> bool:
        """Tell whether the agent still vouches for what it fetched: it closes the connection before it uses the memory again.

        What became of the owner since does not matter.
        """
        return self._connection is None or _is_open(self._connection)

    def unchanged(self, block_ids: npt.NDArray[np.int32], states: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Tell which of the job's slots hold what was asked for, in its order."""
        found: npt.NDArray[np.bool_] = self._good[: len(block_ids)]
        return found

    def key(self, block: int) -> bytes:
        """Slots have no keys: there are no checksums to compare with."""
        raise NotImplementedError


def staging_of(mirror: TableReader, rank: int) -> StagedReader | None:
    """Return the agent's memory into which a mirror's blocks are fetched, for who opens it ahead; None if there is none."""
    memory = next((each for each in mirror.memories if each.rank == rank), None)
    if memory is None or not memory.layers:
        return None
    return StagedReader(mirror, memory, np.empty(0, np.bool_), _slots(memory))


def _slots(memory: Memory) -> int:
    return memory.regions[0].size // memory.layers[0].stride


@dataclass(slots=True)
class _Fetch:
    job: ImportJob
    reader: TableReader
    memory: Memory
    connection: socket.socket
    unsent: memoryview
    until: float
    silent_at: float
    answer: bytearray = field(default_factory=bytearray)
    staged: bool = False


Ready = tuple[ImportJob, StagedReader | None, str]
"""A job whose blocks were fetched, as one out of the agent's memory, with its reader; or the job, None, and why it failed."""


class Fetches:
    """One worker's, of one rank; all calls come from its thread.

    An agent that fell silent is asked nothing more until something comes on the connection on which it did.
    """

    def __init__(self, table_dir: Path, rank: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._socket = table_dir / SOCKET
        self._rank = rank
        self._clock = clock
        self._fetches: dict[JobId, _Fetch] = {}
        self._silent: socket.socket | None = None

    def pending(self) -> int:
        """Return how many fetches are not over."""
        return sum(not fetch.staged for fetch in self._fetches.values())

    def begin(self, job: ImportJob, reader: TableReader) -> None:
        """Ask the agent for the blocks of a job. Raises NodeError if there is none, or if the source has nothing for us."""
        memory = next((each for each in reader.memories if each.rank == self._rank), None)
        if memory is None or not memory.layers or not len(job):
            raise NodeError(f"{reader.name} has no memory that another node could read")
        if self._is_silent():
            raise NodeError("this node's agent is silent", "silent")
        asked = BlocksAsked(
            job.source,
            job.epoch,
            self._rank,
            job.source_blocks.astype("<u4").tobytes(),
            job.states.astype("<u8").tobytes(),
            job.counts,
        )
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            connection.connect(str(self._socket))
            if _listener(connection) != reader.pid:  # it fetches into other memory than this mirror names
                raise OSError(f"it is not the one that mirrored {reader.name}")
        except OSError as error:
            connection.close()
            raise NodeError(f"this node's agent: {error}") from error
        now, unsent = self._clock(), memoryview(encode(asked))
        fetch = self._fetches[job.id] = _Fetch(
            job, reader, memory, connection, unsent, now + FETCH_SECONDS_MAX, now + SILENT_SECONDS
        )
        with contextlib.suppress(OSError):  # what goes wrong here goes wrong in `poll` again
            _send(fetch)

    def poll(self) -> list[Ready]:
        """Return the fetches that ended since the last call, each once."""
        ready: list[Ready] = []
        for fetch in [fetch for fetch in self._fetches.values() if not fetch.staged]:
            try:
                staged, now = self._advance(fetch), self._clock()
                if staged is None and now > fetch.until:
                    raise NodeError(f"{fetch.job.source} took too long", "slow")
                if staged is None and now > fetch.silent_at:
                    self._keep_silent(fetch)
                    raise NodeError(f"this node's agent is silent for {SILENT_SECONDS:g} s", "silent")
            except (OSError, NodeError) as error:
                self.release(fetch.job.id)
                ready.append((fetch.job, None, f"{fetch.job.source}: {error}"))
                continue
            if staged is not None:
                fetch.staged = True
                ready.append(_ready(fetch, staged))
        return ready

    def release(self, job: JobId) -> None:
        """The copy has ended, or the fetch is not wanted any more: its memory is the agent's again."""
        fetch = self._fetches.pop(job, None)
        if fetch is not None:
            fetch.connection.close()

    def close(self) -> None:
        """Give everything up."""
        for job in list(self._fetches):
            self.release(job)
        self._forget_silent()

    def _advance(self, fetch: _Fetch) -> Staged | None:
        with contextlib.suppress(BlockingIOError):
            _send(fetch)
            while data := fetch.connection.recv(READ_BYTES):
                fetch.answer += data
                fetch.silent_at = self._clock() + SILENT_SECONDS
                for message in _taken(fetch.answer):
                    if not isinstance(message, Beat):
                        return _checked(message, len(fetch.job))
            raise NodeError("the agent ended")
        return None

    def _keep_silent(self, fetch: _Fetch) -> None:
        """Keep the connection of a fetch, to see by it when the agent goes on."""
        self._forget_silent()
        self._silent = fetch.connection.dup()

    def _is_silent(self) -> bool:
        if self._silent is not None and not _is_quiet(self._silent):
            self._forget_silent()
        return self._silent is not None

    def _forget_silent(self) -> None:
        silent, self._silent = self._silent, None
        if silent is not None:
            silent.close()


def _taken(answer: bytearray) -> Iterator[Message]:
    """Take the messages that are there in whole."""
    while len(answer) >= LENGTH_BYTES:
        end = LENGTH_BYTES + body_bytes(bytes(answer[:LENGTH_BYTES]))
        if len(answer) < end:
            return
        body = bytes(answer[LENGTH_BYTES:end])
        del answer[:end]
        yield decode(body)


def _listener(connection: socket.socket) -> int:
    """Return the process that listens where a connection leads."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(found)[0])


def _send(fetch: _Fetch) -> None:
    """Send what is left of the question. Raises OSError, BlockingIOError while the agent takes no more."""
    while fetch.unsent:
        fetch.unsent = fetch.unsent[fetch.connection.send(fetch.unsent) :]


def _checked(answer: object, count: int) -> Staged:
    if not isinstance(answer, Staged):
        raise NodeError("the agent answers something else")
    if 1 not in answer.good:
        raise NodeError(answer.reason or "none of the blocks came")
    if len(answer.good) != count or answer.first < 0:
        raise NodeError("the agent speaks of other blocks")
    return answer


def _ready(fetch: _Fetch, staged: Staged) -> Ready:
    """Return the job as one out of the agent's memory."""
    good, memory = np.frombuffer(staged.good, np.uint8) == 1, fetch.memory
    room = _slots(memory)
    if staged.first + len(good) > room:
        # what found no room in the agent's memory did not come, and must not be read beyond its end
        slots = np.minimum(np.arange(staged.first, staged.first + len(good)), room - 1)
    else:
        slots = np.arange(staged.first, staged.first + len(good))
    job = replace(fetch.job, source_blocks=slots.astype(np.int32), states=np.zeros(len(good), np.uint64))
    return job, StagedReader(fetch.reader, memory, good, room, fetch.connection), staged.reason


def _is_open(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except OSError:  # closed here or there
        return False


def _is_quiet(connection: socket.socket) -> bool:
    """Tell whether nothing came on a connection since it was read, its end included."""
    try:
        connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:  # it has ended
        return False
    return False
