"""A real Valkey server for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.frame_tiers.vault.address import VaultAddress
from tests.unit.engine.frame_tiers.vault_servers import valkey


@pytest.fixture(scope="module")
def valkey_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultAddress]:
    with valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server.address
