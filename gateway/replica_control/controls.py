"""The control of several fleets' replicas as one: a replica's name tells whose it is."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.errors import UnknownReplica
from gateway.replica_control.control import ReplicaControl
from gateway.replica_control.shapes import ControlledReplica, ReplicaList


class ReplicaControls:
    """The methods do what those of the replica's own fleet do, for which it is the only ready one if its model has no other."""

    def __init__(self, controls: Sequence[ReplicaControl]) -> None:
        self._controls = tuple(controls)

    def all(self) -> ReplicaList:
        """Every replica now."""
        found = [control.all() for control in self._controls]
        replicas = [replica for each in found for replica in each.replicas]
        return ReplicaList(restartable=all(each.restartable for each in found), replicas=replicas)

    async def drain(self, name: str, *, force: bool = False) -> ControlledReplica:
        """Raises ApiError."""
        return await self._of(name).drain(name, force=force)

    async def resume(self, name: str) -> ControlledReplica:
        """Raises ApiError."""
        return await self._of(name).resume(name)

    async def restart(self, name: str, *, force: bool = False) -> ControlledReplica:
        """Raises ApiError."""
        return await self._of(name).restart(name, force=force)

    def _of(self, name: str) -> ReplicaControl:
        known: list[str] = []
        for control in self._controls:
            names = control.names()
            if name in names:
                return control
            known += names
        raise UnknownReplica(name, known)
