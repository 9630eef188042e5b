"""Who holds how much of a prompt where there are too many replicas to list each: worked out when somebody asks."""

from collections.abc import Callable, Iterator, Mapping

from gateway.block_registry.holder_index import Lengths, places


class Held(Mapping[str, int]):
    """Leading blocks by replica, as a look-up in the index gave them; replicas without any are left out.

    `names` are those at the index's places, `place_of` the inverse for a table that is followed.
    """

    def __init__(self, lengths: Lengths, names: Mapping[int, str], place_of: Callable[[str], int]) -> None:
        self._lengths = lengths
        self._names = names
        self._place_of = place_of

    def __getitem__(self, name: str) -> int:
        place = self._place_of(name)
        for bits, blocks in self._lengths:
            if bits >> place & 1:
                return blocks
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        """Yield those that hold most first."""
        for bits, _ in self._lengths:
            for place in places(bits):
                yield self._names[place]

    def __len__(self) -> int:
        return sum(bits.bit_count() for bits, _ in self._lengths)


class Reached(Mapping[str, tuple[str, int]]):
    """For each replica to which a tier gives more than it holds, which one gives most, and how far it has the prompt then."""

    def __init__(self, replicas: Mapping[str, object], reach: Callable[[str], tuple[str, int]]) -> None:
        self._replicas = replicas
        self._reach = reach

    def __getitem__(self, name: str) -> tuple[str, int]:
        if name in self._replicas:
            tier, blocks = self._reach(name)
            if tier:
                return tier, blocks
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._replicas if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)
