"""Real block tables of a made-up fleet, and a fleet to go with them, for the gateway's tests."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from engine.fleet import FleetSnapshot, Replica, ReplicaState
from transport.groups import Group
from transport.keys import chain_keys, root_key
from transport.table.layout import Description
from transport.table.reader import TableReader
from transport.table.writer import TableWriter

BLOCK_SIZE = 4
FIELDS = {"weights": "w1", "dtype": "bfloat16"}


class ReplicaTables:
    """Writes tables as replicas do. `start` again under a name that was stopped is a new epoch."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.writers: dict[str, TableWriter] = {}

    def start(
        self,
        name: str,
        *,
        fields: Mapping[str, str] = FIELDS,
        status: str = "ok",
        transport: str = "shared_memory",
        block_size: int = BLOCK_SIZE,
        blocks: int = 256,
        hash_name: str = "xxh3_128",
        groups: tuple[Group, ...] = (),
    ) -> TableWriter:
        about = Description(name, os.getpid(), hash_name, transport, status, dict(fields), (), groups)
        self.writers[name] = TableWriter(self.directory, about, block_size, blocks)
        return self.writers[name]

    def stop(self, name: str) -> None:
        self.writers.pop(name).close()

    def hold(self, name: str, ids: Sequence[int], salt: str = "", lora: str = "", *, first_block: int = 0) -> None:
        """Let the replica offer all full blocks of `ids`."""
        reader = TableReader(self.directory / f"{name}.table")
        root = root_key(reader.fingerprint, salt, lora, reader.hash_name)
        keys = chain_keys(root, ids, reader.block_size, reader.hash_name)
        reader.close()
        self.writers[name].publish(range(first_block, first_block + len(keys)), keys)


@contextmanager
def replica_tables(directory: Path) -> Iterator[ReplicaTables]:
    tables = ReplicaTables(directory)
    try:
        yield tables
    finally:
        for name in list(tables.writers):
            tables.stop(name)


class StandingFleet:
    """A fleet whose replicas are in the states they are set to."""

    def __init__(self, *names: str, directory: Path = Path("/nowhere")) -> None:
        self._snapshot = FleetSnapshot(0, "org/model", "model", str(directory), ())
        self.suspects: list[str] = []
        self.become(*names)

    def become(self, *names: str) -> None:
        """Consist of these replicas from now on."""
        replicas = tuple(
            Replica(name, ReplicaState.READY, f"/run/{name}.sock", 100 + place, 0, "", "cpu", "")
            for place, name in enumerate(names)
        )
        self._snapshot = replace(self._snapshot, version=self._snapshot.version + 1, replicas=replicas)

    def measured(self, bytes_per_second: float) -> None:
        """Blocks come from other nodes at this rate."""
        self._snapshot = replace(self._snapshot, version=self._snapshot.version + 1, network_bytes_per_second=bytes_per_second)

    def snapshot(self) -> FleetSnapshot:
        return self._snapshot

    def suspect(self, name: str, *, overdue: bool = False) -> None:
        self.suspects.append(name)

    restarts = True

    async def drain(self, name: str) -> None:
        self.set(name, ReplicaState.DRAINING)

    async def resume(self, name: str) -> None:
        self.set(name)

    async def restart(self, name: str) -> None:
        """Be another process, ready at once."""
        found = self._snapshot.find(name)
        assert found is not None
        self.set(name, pid=(found.pid or 0) + 1000, restarts=found.restarts + 1)

    async def idle_in(self, name: str, seconds: float) -> bool:
        return True

    def set(self, name: str, state: ReplicaState = ReplicaState.READY, **changes: object) -> None:
        replicas = tuple(
            replace(replica, state=state, **changes) if replica.name == name else replica  # type: ignore[arg-type]
            for replica in self._snapshot.replicas
        )
        self._snapshot = replace(self._snapshot, version=self._snapshot.version + 1, replicas=replicas)
