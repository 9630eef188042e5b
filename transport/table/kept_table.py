"""A block table that outlives its writer: another process, its keeper, holds the lock, and the next writer goes on with it.

Readers see a table like any other. What they copy is memory that the keeper holds as well, so a dead writer takes nothing away:
what it was writing when it died is not on offer.
"""

import mmap
import os
from pathlib import Path

import numpy as np

from transport.errors import TableError
from transport.keys import Keys
from transport.table import liveness
from transport.table.layout import (
    BLOCKS_MAX,
    DESCRIPTION_BYTES_MAX,
    HEADER,
    MAGIC,
    PAGE_BYTES,
    VALID_OFFSET,
    VERSION,
    WAYS,
    Description,
    Layout,
    areas,
    bucket_count,
)
from transport.table.writer import TableWriter

_ONE = np.uint64(1)


class KeptTable(TableWriter):
    """`draft` is an empty file that its keeper has locked, in the same directory: it becomes the table if there is none yet.

    With a `second_name`, a path on the same file system, a table that is made is to be had by that as well, for a later keeper.
    A table of the same description under the keeper's lock is taken over with all it offers; any other is withdrawn and
    replaced. The caller sees to it that there is one writer. Raises TableError if the draft is not as described, OSError if
    memory is short.
    """

    def __init__(
        self,
        directory: Path,
        description: Description,
        block_size: int,
        blocks: int,
        draft: Path,
        second_name: Path | None = None,
    ) -> None:
        self._draft = draft
        self._second_name = second_name
        coded = [memory.coded for memory in description.memories]
        self.coded = coded[0] if coded and all(coded) else None
        """How blocks may lie coded, which is the same for all ranks but for the place; None if they do not."""
        super().__init__(directory, description, block_size, blocks)

    def _open(self, directory: Path, description: Description, block_size: int, encoded: bytes) -> None:
        if not self._take_over(block_size, encoded):
            self._make(block_size, encoded)
        if self._second_name is not None and not self._named_twice(self._second_name):  # a writer may have died before that
            self._second_name.unlink(missing_ok=True)
            os.link(self.path, self._second_name)

    def _make(self, block_size: int, encoded: bytes) -> None:
        try:
            fd = os.open(self._draft, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise TableError(f"{self._draft}: {error.strerror}") from error
        try:
            if os.fstat(fd).st_size or not liveness.claimed(fd):
                raise TableError(f"{self._draft} is not an empty file that its keeper has locked")
            os.posix_fallocate(fd, 0, self.layout.total)
            self._map = mmap.mmap(fd, self.layout.total)
        finally:
            os.close(fd)
        self._fill(block_size, encoded)
        if self._second_name is not None:  # first: what it names may be of a version whose offers cannot be withdrawn
            self._second_name.unlink(missing_ok=True)
        os.rename(self._draft, self.path)

    def _named_twice(self, second_name: Path) -> bool:
        try:
            return os.path.samestat(second_name.lstat(), self.path.lstat())
        except FileNotFoundError:
            return False

    def _take_over(self, block_size: int, encoded: bytes) -> bool:
        """Go on with the table that is there, if it is one of ours; withdraw what any other offers."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            size = os.fstat(fd).st_size
            if size < PAGE_BYTES:
                return False
            mapped = mmap.mmap(fd, size)
            kept = liveness.claimed(fd)
        finally:
            os.close(fd)
        magic, version, page, epoch, *sizes = HEADER.unpack_from(mapped)
        layout = self.layout
        ours = [block_size, layout.blocks, layout.buckets, WAYS, layout.description_bytes]
        same = (magic, version, page, sizes, size) == (MAGIC, VERSION, PAGE_BYTES, ours, layout.total)
        if kept and same and mapped[PAGE_BYTES : PAGE_BYTES + len(encoded)] == encoded:
            self._map, self.epoch = mapped, epoch
            self._view()
            self._repair()
            return True
        _withdraw(mapped, size)
        return False

    def _repair(self) -> None:
        """Enter what is on offer anew: its last writer may have died between two words."""
        held = np.flatnonzero(self._states & _ONE == 0)
        self._index[:] = 0
        self._index_add(held, self._keys[held])
        self._words[VALID_OFFSET // 8] = len(held)
        self._journal.note_all()

    def valid(self) -> int:
        """Return how many blocks are on offer."""
        return int(self._words[VALID_OFFSET // 8])

    def all_offered(self) -> tuple[list[int], Keys]:
        """Return every block on offer and the keys, shape (n, 2)."""
        return self.offered(range(self.layout.blocks))

    def close(self) -> None:
        """Nothing: what is stored stays on offer. The table ends with its keeper."""

    def end(self) -> None:
        """Withdraw everything: what it says is in doubt. The file stays, for its keeper to remove."""
        self.clear()


def _withdraw(mapped: mmap.mmap, size: int) -> None:
    """Withdraw all that a table of another description offers: the memory behind it is about to be written."""
    magic, version, page, _, _, blocks, buckets, ways, length = HEADER.unpack_from(mapped)
    layout = Layout(blocks, buckets, length)
    bounded = 0 < blocks <= BLOCKS_MAX and buckets == bucket_count(blocks) and length <= DESCRIPTION_BYTES_MAX
    if (magic, version, page, ways) == (MAGIC, VERSION, PAGE_BYTES, WAYS) and bounded and layout.total == size:
        states = areas(mapped, layout).states
        states |= _ONE
