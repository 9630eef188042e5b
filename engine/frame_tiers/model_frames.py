"""How the blocks of one model become frames: their shape, and what each frame is found by."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import xxhash

from engine.frame_tiers.secrecy import OPEN, Secrecy
from engine.frame_tiers.store import FrameId
from transport.fingerprint import fingerprint_digest
from transport.frames import layouts
from transport.frames.shape import Number, Shape
from transport.groups import Group, plain
from transport.keys import Keys
from transport.table.layout import Description, Memory


@dataclass(frozen=True)
class ModelFrames:
    """Of the model whose host memory a table describes. Models with equal fingerprints have equal frames.

    A table says of a block its key, but not its KV cache group. The key is the group's own, and the group's size decides what a
    block is, which its checksum or, on GPUs, a byte beside it tells: so a frame names the first group of that size.
    """

    description: Description
    block_size: int
    secrecy: Secrecy = OPEN

    @cached_property
    def fingerprint(self) -> bytes:
        """The digest that the tables have."""
        return fingerprint_digest(self.description.fingerprint)

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.description.groups

    @cached_property
    def plain(self) -> bool:
        """Whether all blocks of a prefix are needed and nothing else."""
        return plain(self.groups)

    @cached_property
    def memories(self) -> tuple[Memory, ...]:
        """One a rank, in their order."""
        return tuple(sorted(self.description.memories, key=lambda memory: memory.rank))

    @cached_property
    def ranks(self) -> tuple[bytes, ...]:
        """The fingerprint of each rank's frames."""
        about = self.fingerprint + self.secrecy.mark
        return tuple(xxhash.xxh3_128_digest(b"peerkv-rank %d " % memory.rank + about) for memory in self.memories)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of a block of each group on one rank, the same on all."""
        found = [0] * max(1, len(self.groups))
        for layer in self.memories[0].layers:
            found[layer.group] += layer.bytes
        return tuple(found)

    def framed_group(self, group: int) -> int:
        """Return the group that frames name for blocks of `group`."""
        return self.sizes.index(self.sizes[group])

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """What lies in a block of each group: numbers of one kind, or bytes where there are several kinds."""
        kinds = {layout.partition(" ")[0] for layout in self.description.fingerprint.get("strides", "").split("; ")}
        number = layouts.NUMBERS.get(kinds.pop(), Number.BYTES) if len(kinds) == 1 else Number.BYTES
        return tuple(
            layouts.state(1, size // number.nbytes, number) if size % number.nbytes == 0 else layouts.state(1, size)
            for size in self.sizes
        )

    @cached_property
    def coded_shapes(self) -> tuple[Shape | None, ...]:
        """What a codec with loss has to know of a block of each group; None where it takes none: states, unknown layouts.

        A table does not tell groups of one size apart: they have one shape, or none.
        """
        found: list[Shape | None] = []
        for number, group in enumerate(self.groups):
            sizes = [layer.bytes for layer in self.memories[0].layers if layer.group == number]
            told = layouts.told(self.description.fingerprint, sizes[0], len(sizes)) if len(set(sizes)) == 1 else None
            found.append(told if group.kind != "state" else None)
        alike = [{shape for shape, size in zip(found, self.sizes, strict=True) if size == own} for own in self.sizes]
        return tuple(shape if len(shapes) == 1 else None for shape, shapes in zip(found, alike, strict=True))

    def ids(self, key: npt.NDArray[np.uint64] | bytes) -> list[FrameId]:
        """Return the ids of a block's frames, one a rank."""
        own = bytes(key)
        return [fingerprint + own for fingerprint in self.ranks]

    def all_ids(self, keys: Keys) -> list[FrameId]:
        """Return the ids of the frames of blocks with `keys` (n, 2): those of a block one after the other."""
        return [each for key in keys for each in self.ids(key)]
