"""What several tests of the gateway start from."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.unit.transport.replica_tables import ReplicaTables, replica_tables

settings.register_profile("peerkv", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("peerkv")


@pytest.fixture
def two_tables(tmp_path: Path) -> Iterator[ReplicaTables]:
    """The tables of replicas a and b."""
    with replica_tables(tmp_path / "tables") as tables:
        tables.start("a")
        tables.start("b")
        yield tables
