"""POST /kv/flush reaches disk and vault too, after the replicas: what is above them goes down no more."""

from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from gateway.admin.guard import admin_router
from gateway.admin.kv_routes import add_flush_route
from gateway.kept_prefixes.shapes import FlushedPrefixes
from tests.unit.transport.replica_tables import StandingFleet


@pytest.fixture
def said():
    """In which order things were done."""
    return []


def app_with(said, below):
    async def post_control(replica, path, params):
        said.append(replica.name)
        return b'{"success": true}'

    async def flush_tiers():
        said.append("tiers")
        return below

    app = FastAPI()
    keeper = SimpleNamespace(flushed=lambda flushed, failed: FlushedPrefixes())
    access = SimpleNamespace(check=lambda scope: None)
    router = admin_router(access)
    add_flush_route(router, [StandingFleet("a", "b")], SimpleNamespace(post_control=post_control), keeper, flush_tiers)
    app.include_router(router)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


@pytest.mark.parametrize(
    ("below", "status", "flushed", "failed"),
    [
        ({}, 200, ["a", "b"], {}),
        ({"disk": "", "vault": ""}, 200, ["a", "b", "disk", "vault"], {}),
        ({"disk": "", "vault": "no answer in time"}, 502, ["a", "b", "disk"], {"vault": "no answer in time"}),
    ],
)
async def test_disk_and_vault_are_emptied_last_and_named(said, below, status, flushed, failed):
    async with app_with(said, below) as client:
        answer = await client.post("/kv/flush")
    assert answer.status_code == status
    assert (answer.json()["flushed"], answer.json()["failed"]) == (flushed, failed)
    assert said == ["a", "b", "tiers"]
