"""POST /kv/flush reaches disk and vault too, after the replicas: what is above them goes down no more."""

from types import SimpleNamespace
from typing import cast

import httpx
import pytest
from fastapi import FastAPI

from engine.joined_fleet import NodesTold, NodeTold, write_nodes
from gateway.admin.guard import admin_router
from gateway.admin.kv_routes import add_flush_route
from gateway.kept_prefixes.shapes import FlushedPrefixes
from gateway.serve.fleet_parts import FleetParts
from gateway.serve.wiring import _flush_tiers
from tests.unit.transport.replica_tables import StandingFleet
from transport.node.messages import FleetTold


@pytest.fixture
def said():
    """In which order things were done."""
    return []


def app_with(said, below, replicas=("a", "b")):
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
    add_flush_route(router, [StandingFleet(*replicas)], SimpleNamespace(post_control=post_control), keeper, flush_tiers)
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


async def test_replicas_of_other_nodes_are_emptied_and_their_nodes_disks_are_left_to_them(said):
    async with app_with(
        said, {"node-d": "it is not heard (gone): flush it there"}, ("a", "node-c:a", "node-b:a", "node-b:b")
    ) as client:
        answer = await client.post("/kv/flush")
    assert answer.status_code == 502
    told = answer.json()
    assert told["flushed"] == ["a", "node-c:a", "node-b:a", "node-b:b"]
    assert told["disks_left"] == ["node-b", "node-c"]
    assert told["failed"] == {"node-d": "it is not heard (gone): flush it there"}


async def test_a_node_that_is_not_heard_was_not_flushed(tmp_path):
    class Tiers:
        async def flush(self):
            return {"disk": ""}

    told: list[str] = []
    part = SimpleNamespace(tiers=Tiers(), planner=SimpleNamespace(flushed=lambda: told.append("flushed")))
    nodes = (NodeTold("node-b", "h:1", FleetTold()), NodeTold("node-c", "h:2", trouble="nothing came for 3 s"))
    write_nodes(tmp_path, NodesTold("node-a", nodes))
    outcome = await _flush_tiers(cast("list[FleetParts]", [part]), tmp_path)()
    assert told == ["flushed"]
    assert outcome == {"disk": "", "node-c": "it is not heard (nothing came for 3 s): flush it there"}
