"""How old the blocks of a tier are, so that none stays longer than it may. Plain code without a clock: times are in ns."""

from collections import OrderedDict
from collections.abc import Callable, Iterable

TTL_SECONDS_MAX = 10 * 365 * 86400
"""Ten years. Who wants blocks to stay without end says 0."""
EXPIRED_MAX = 256
"""So many slots of either kind, due or overdue, are tried in a step: no step takes long, however many become too old in it."""


class Ages:
    """Slots in the order in which they were filled, each for at most `ttl_ns`. A call takes O(1) for each slot that it is told.

    Of what was `stored` before, the age is not known: it begins with the first `expire`.
    """

    def __init__(self, ttl_ns: int, stored: Iterable[int] = ()) -> None:
        self._ttl_ns = ttl_ns
        self._now_ns = -1
        self._since: OrderedDict[int, int] = OrderedDict.fromkeys(stored, -1)
        self._overdue: OrderedDict[int, None] = OrderedDict()  # held when their time was up

    def filled(self, slot: int) -> None:
        """A block was stored in an empty slot, at the time of the last `expire`."""
        self._since[slot] = self._now_ns

    def emptied(self, slot: int) -> None:
        """What was in a slot gave way."""
        if self._since.pop(slot, None) is None:
            self._overdue.pop(slot, None)

    def expire(self, now_ns: int, drop: Callable[[int], bool]) -> list[int]:
        """Call `drop` for slots whose time is up, and return those for which it returned True, which are empty; the others are
        held, and tried again."""
        if self._now_ns < 0:
            self._since = OrderedDict.fromkeys(self._since, now_ns)
        self._now_ns = now_ns
        due = [self._overdue.popitem(last=False)[0] for _ in range(min(len(self._overdue), EXPIRED_MAX))]
        for _ in range(EXPIRED_MAX):
            first = next(iter(self._since.items()), None)
            if first is None or now_ns - first[1] < self._ttl_ns:
                break
            due.append(self._since.popitem(last=False)[0])
        gone = []
        for slot in due:
            if drop(slot):
                gone.append(slot)
            else:
                self._overdue[slot] = None
        return gone

    def clear(self) -> None:
        """All slots are empty."""
        self._since.clear()
        self._overdue.clear()
