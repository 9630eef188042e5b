"""Which of the stores that are wanted are not in use, as a gateway hears it: what the log and `/ready` say of that."""

from collections.abc import Sequence

from engine.frame_tiers.messages import TierStats
from engine.frame_tiers.store import StoreName

OK = "ok"
OPENING = "off: it is being opened"
"""The state of a store that was not tried yet: neither well nor wrong."""
SILENT = "off: its process does not answer; read tiers.log"
SECONDS_SILENT_MAX = 30.0
"""A process that is started again may be silent for so long before anything is said."""
SECONDS_STARTING_MAX = 180.0
"""So may one that was never heard: it is started once vLLM is imported, which takes minutes on a slow disk."""
_TO_DO = {
    "disk": "Give --disk a directory with room that peerkv alone writes",
    "vault": "See that the vault runs and is reached, and --vault, --vault-password-file and --vault-ca-file are right",
}


class Standing:
    """Follows the states of `wanted`. Takes `now`, seconds of any clock that does not go back."""

    def __init__(self, wanted: Sequence[StoreName], now: float) -> None:
        self._wrong: dict[StoreName, str] = {}
        self._known: dict[StoreName, None] = dict.fromkeys(wanted)
        self._silent_until = now + SECONDS_STARTING_MAX

    @property
    def known(self) -> tuple[StoreName, ...]:
        """The stores that are wanted or were heard of."""
        return tuple(self._known)

    def hear(self, stats: TierStats | None, now: float) -> list[str]:
        """Take what was heard, None: nothing; return a line for each store that went off or came back."""
        if stats is not None:
            self._silent_until = now + SECONDS_SILENT_MAX
            found = {store.name: store.state for store in stats.stores if store.state != OPENING}
        elif now < self._silent_until:
            found = {}
        else:
            found = dict.fromkeys(self._known, SILENT)
        lines = []
        for name, state in found.items():
            was = self._wrong.pop(name, "")
            self._known[name] = None
            if state != OK:
                self._wrong[name] = state
            if (state != OK) != bool(was):
                lines.append(f"the {name} is in use again" if state == OK else _said(name, state))
        return lines

    def warnings(self) -> list[str]:
        """What is wrong with each store that is not in use or takes nothing, and what to do."""
        return [_said(name, state) for name, state in self._wrong.items()]


def _said(name: StoreName, state: str) -> str:
    return f"the {name} is {state}. {_TO_DO[name]}; it is tried again by itself."
