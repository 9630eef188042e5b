"""The planner that the tests ask."""

from pathlib import Path

import pytest

from tests.unit.gateway.planner.planned_fleet import Place
from tests.unit.gateway.prompts.tiny_model import make_model
from tests.unit.transport.replica_tables import ReplicaTables


@pytest.fixture
def place(two_tables: ReplicaTables, tmp_path: Path) -> Place:
    return Place(two_tables, make_model(tmp_path / "model"))
