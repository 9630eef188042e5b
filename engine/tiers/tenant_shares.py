"""How much of a tier each tenant has, and whose blocks give way so that none has more than its share while others want room."""


class TenantShares:
    """Of `slots`, each tenant may have the share `share_max` when others want room: where there is any, it has more.

    A tenant is known by its mark (transport/table/quality.py); two that have the same one have a share between them.
    """

    def __init__(self, slots: int, share_max: float) -> None:
        self._limit = max(1, int(slots * share_max))
        self._taken: dict[int, int] = {}
        self._over: dict[int, None] = {}

    def took(self, mark: int, slots: int) -> None:
        """A block of this tenant's has so many slots more, or, if that is negative, fewer."""
        taken = self._taken[mark] = self._taken.get(mark, 0) + slots
        if taken > self._limit:
            self._over[mark] = None
        elif mark in self._over:
            del self._over[mark]

    def yields(self, mark: int, slots: int) -> list[int]:
        """Return whose blocks give way so that this tenant gets so many slots: nobody's but its own if it has its share, else
        those of who has more, the most first; empty if nobody has."""
        if self._taken.get(mark, 0) + slots > self._limit:
            return [mark]
        return sorted(self._over, key=self._taken.__getitem__, reverse=True)
