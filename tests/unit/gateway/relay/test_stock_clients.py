"""The openai and anthropic packages, unchanged, over the real front door; `make clients` has the others."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.clients.programs import PROGRAMS
from tests.unit.gateway.running_door import running_door


@pytest.mark.parametrize("name", ["openai", "anthropic"])
async def test_a_stock_client_gets_all_that_it_asks_for(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    async with running_door(tmp_path, tenants=[{"name": "acme", "api_key": "acme-key"}]) as door:
        await door.add_engine("replica-0")
        got = await asyncio.to_thread(PROGRAMS[name], door.url, "acme-key", "fake-model")
    assert all(got.values()), got
    assert got["refused"] == ("model_not_found" if name == "openai" else "not_found_error")
    assert str(got["streamed"]).startswith("w0 w1")
