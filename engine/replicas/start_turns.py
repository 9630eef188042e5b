"""Replicas that share a GPU start one after the other: vLLM measures how the GPU's memory grows while it starts."""

from collections.abc import Iterable, Mapping

from engine.fleet import ReplicaState
from engine.replicas.member import Member


class StartTurns:
    """Who waits for whom. Belongs to one event loop; it changes nothing but the start in a member's lifecycle."""

    def __init__(self, members: Iterable[Member]) -> None:
        sharing: dict[str, list[Member]] = {}
        for member in members:
            sharing.setdefault(member.launch.device, []).append(member)
        self._sharing: Mapping[str, list[Member]] = {
            device: those for device, those in sharing.items() if device != "cpu" and len(those) > 1
        }
        self._waiting: list[Member] = []

    def hold(self, member: Member) -> bool:
        """Tell whether `member`, which is about to start, has to wait."""
        before = next((one for one in self._sharing.get(member.launch.device, ()) if self._starts(one, member)), None)
        if before is None:
            return False
        member.life.held_back(f"waiting until {before.name} has started on the same GPU")
        self._waiting.append(member)
        return True

    def forget(self, member: Member) -> bool:
        """`member` is being stopped. Return whether it was waiting: then it has no process, and stops waiting."""
        if member not in self._waiting:
            return False
        self._waiting.remove(member)
        return True

    def due(self, now: float) -> list[Member]:
        """Return those whose turn has come, each once."""
        found = []
        for member in list(self._waiting):
            if not any(self._starts(one, member) for one in self._sharing[member.launch.device]):
                self._waiting.remove(member)
                member.life.let_go(now)
                found.append(member)
        return found

    def _starts(self, one: Member, other: Member) -> bool:
        """Whether `one` is starting, in front of `other`."""
        return one is not other and one.life.state is ReplicaState.STARTING and one not in self._waiting
