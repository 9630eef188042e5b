"""What several tests of the gateway start from."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.transport.replica_tables import ReplicaTables, replica_tables


@pytest.fixture
def two_tables(tmp_path: Path) -> Iterator[ReplicaTables]:
    """The tables of replicas a and b."""
    with replica_tables(tmp_path / "tables") as tables:
        tables.start("a")
        tables.start("b")
        yield tables
