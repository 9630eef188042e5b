"""Copies of KV between replicas; they share the bandwidth out of an owner and into an importer."""

from dataclasses import dataclass, field

from bench.simulate.profiles import LinkProfile


@dataclass(eq=False, slots=True)
class Copy:
    """A copy under way. `due` is when it will be done if nothing changes; events of an older `version` are void."""

    owner: int
    importer: int
    bytes: int
    tag: int
    across_hosts: bool = False
    left: float = 0.0
    rate: float = 0.0
    since: float = 0.0
    due: float = 0.0
    version: int = 0


@dataclass(slots=True)
class BytesMoved:
    """Sums since the start."""

    within_host: int = 0
    across_hosts: int = 0


@dataclass(slots=True)
class Links:
    """Each copy gets the smaller of its shares of the two links that it crosses."""

    profile: LinkProfile
    moved: BytesMoved = field(default_factory=BytesMoved)
    _on_link: dict[tuple[int, bool, bool], list[Copy]] = field(default_factory=dict)

    def across_hosts(self, one: int, other: int) -> bool:
        """Whether two replicas are on different hosts."""
        each = self.profile.replicas_each_host
        return one // each != other // each

    def seconds_before(self, copy: Copy) -> float:
        """The fixed cost of a copy before its bytes flow."""
        return self.profile.across_hosts_seconds if copy.across_hosts else self.profile.within_host_seconds

    def start(self, copy: Copy, now: float) -> list[Copy]:
        """The copy's bytes flow from now on. Returns the copies whose `due` is new."""
        copy.left, copy.since = float(copy.bytes), now
        out, into = self._links(copy)
        self._on_link.setdefault(out, []).append(copy)
        self._on_link.setdefault(into, []).append(copy)
        return self._share(out, into, now)

    def end(self, copy: Copy, now: float) -> list[Copy]:
        """The copy is done. Returns the copies whose `due` is new."""
        out, into = self._links(copy)
        self._on_link[out].remove(copy)
        self._on_link[into].remove(copy)
        if copy.across_hosts:
            self.moved.across_hosts += copy.bytes
        else:
            self.moved.within_host += copy.bytes
        return self._share(out, into, now)

    @staticmethod
    def _links(copy: Copy) -> tuple[tuple[int, bool, bool], tuple[int, bool, bool]]:
        return (copy.owner, True, copy.across_hosts), (copy.importer, False, copy.across_hosts)

    def _share(self, out: tuple[int, bool, bool], into: tuple[int, bool, bool], now: float) -> list[Copy]:
        touched = dict.fromkeys([*self._on_link[out], *self._on_link[into]])
        for copy in touched:
            copy.left = max(0.0, copy.left - copy.rate * (now - copy.since))
            copy.since = now
            copy.rate = self._rate(copy)
            copy.due = now + copy.left / copy.rate
            copy.version += 1
        return list(touched)

    def _rate(self, copy: Copy) -> float:
        profile = self.profile
        whole = profile.across_hosts_bytes_second if copy.across_hosts else profile.within_host_bytes_second
        out, into = self._links(copy)
        return whole / max(len(self._on_link[out]), len(self._on_link[into]))
