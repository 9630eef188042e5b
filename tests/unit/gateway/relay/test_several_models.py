"""Several models behind one front door: a request goes to the replicas of its model, and to no others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.tenants.key_file import write_keys
from gateway.tenants.keys import NORMAL, no_keys
from tests.unit.gateway.limits.limited_keys import limited
from tests.unit.gateway.relay.test_limits import headers
from tests.unit.gateway.running_door import Door, FakeFleet, fake_fleet, running_door, until

MODELS = ("large", "small")


def fleet_of(door: Door, model: str) -> FakeFleet:
    return next(fleet for fleet in map(fake_fleet, door.fleets.all) if fleet.model == model)


async def add(door: Door, model: str, name: str, *arguments: str) -> None:
    await door.add_engine(name, "--served-model-name", model, *arguments, fleet=fleet_of(door, model))


async def requests_of(door: Door, name: str) -> int:
    """How many requests for completions an engine got."""
    return len([each for each in (await door.seen(name))["requests"] if each["path"] == "/v1/completions"])


def completion(model: str = "", **more: Any) -> dict[str, Any]:
    return {"prompt": "hello", "max_tokens": 3, **({"model": model} if model else {}), **more}


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with running_door(tmp_path, models=MODELS) as door:
        await add(door, "large", "large-0")
        await add(door, "small", "small-0", "--lora-modules", "poet=/loras/poet")
        yield door


async def test_a_request_goes_to_the_replica_of_its_model(door: Door) -> None:
    for model, replica in (("small", "small-0"), ("large", "large-0"), ("poet", "small-0"), ("", "large-0")):
        status, answer, sent = await door.post("/v1/completions", completion(model))
        assert (status, sent["x-peerkv-replica"]) == (200, replica), answer


async def test_an_adapter_takes_no_model_of_the_settings_away(tmp_path: Path) -> None:
    async with running_door(tmp_path, models=MODELS) as door:
        await add(door, "large", "large-0", "--lora-modules", "small=/loras/small")
        await add(door, "small", "small-0")
        status, listed, _ = await door.get("/v1/models")
        assert status == 200
        assert {card["id"]: card["parent"] for card in listed["data"]} == {"large": None, "small": None}
        _, _, sent = await door.post("/v1/completions", completion("small"))
        assert sent["x-peerkv-replica"] == "small-0"
        assert door.fleets.names() == [["large"], ["small"]]


async def test_a_model_that_nobody_has_is_told_with_those_that_there_are(door: Door) -> None:
    status, answer, _ = await door.post("/v1/completions", completion("none"))
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "model_not_found", "model")
    assert "large, small, poet" in answer["error"]["message"]
    assert await requests_of(door, "large-0") == await requests_of(door, "small-0") == 0


async def test_all_models_are_listed(door: Door) -> None:
    status, answer, _ = await door.get("/v1/models")
    assert (status, [card["id"] for card in answer["data"]]) == (200, ["large", "small", "poet"])
    assert (await door.get("/v1/models/poet"))[1]["id"] == "poet"
    assert (await door.get("/v1/models/none"))[0] == 404


@pytest.mark.parametrize("trouble", [{"drop": "before"}, {"status": 500}])
async def test_a_retry_goes_to_no_replica_of_another_model(door: Door, trouble: dict[str, Any]) -> None:
    await add(door, "small", "small-1")
    status, answer, _ = await door.post("/v1/completions", completion("small", fake=trouble))
    assert status >= 500, answer
    assert await requests_of(door, "small-0") + await requests_of(door, "small-1") >= 2
    assert await requests_of(door, "large-0") == 0


async def test_a_stream_that_broke_goes_on_with_no_replica_of_another_model(door: Door) -> None:
    body = completion("small", stream=True, temperature=0, max_tokens=8, fake={"drop": "mid", "token_delay": 0.01})
    async with door.session.post(door.url + "/v1/completions", json=body) as answer:
        text = await answer.text()
    assert "replica_lost" in text
    assert await requests_of(door, "large-0") == 0


async def test_a_replica_of_another_model_cannot_be_asked_for(door: Door) -> None:
    at = {"x-peerkv-replica": "large-0"}
    status, answer, _ = await door.post("/v1/completions", completion("small"), headers=at)
    assert (status, answer["error"]["code"]) == (400, "unknown_replica")
    assert await requests_of(door, "large-0") == 0


async def test_a_model_without_a_replica_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    async with running_door(tmp_path, models=MODELS) as door:
        await add(door, "small", "small-0")
        status, answer, _ = await door.post("/v1/completions", completion("large"))
        assert (status, answer["error"]["code"]) == (503, "no_replica_ready")
        assert (await door.post("/v1/completions", completion("small")))[0] == 200
        assert [card["id"] for card in (await door.get("/v1/models"))[1]["data"]] == ["small"]
        fleet_of(door, "small").replicas.clear()
        fleet_of(door, "small").version += 1
        status, answer, _ = await door.post("/v1/completions", completion("small"))
        assert (status, answer["error"]["code"]) == (503, "no_replica_ready")


async def test_before_any_replica_is_ready_all_that_is_configured_is_told_apart_from_what_is_not(tmp_path: Path) -> None:
    async with running_door(tmp_path, models=MODELS) as door:
        assert (await door.get("/v1/models"))[0] == 503
        assert (await door.post("/v1/completions", completion("small")))[0] == 503
        status, answer, _ = await door.post("/v1/completions", completion("none"))
        assert status == 404
        assert "large, small" in answer["error"]["message"]


async def test_a_key_for_one_model_gets_that_one_alone(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    write_keys(keys, no_keys().with_key(limited("only-small", models=("small",))))
    async with running_door(tmp_path, models=MODELS, keys_file=keys) as door:
        await add(door, "large", "large-0")
        await add(door, "small", "small-0")
        given = headers("only-small")
        assert (await door.post("/v1/completions", completion("small"), headers=given))[0] == 200
        for model in ("large", "", "none"):
            status, answer, _ = await door.post("/v1/completions", completion(model), headers=given)
            assert (status, answer["error"]["code"]) == (404, "model_not_found"), model
        assert [card["id"] for card in (await door.get("/v1/models", headers=given))[1]["data"]] == ["small"]
        assert await requests_of(door, "large-0") == 0


async def test_a_key_with_limits_is_told_of_models_as_others_are_while_the_first_one_has_no_replica(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    write_keys(keys, no_keys().with_key(limited("a", tokens_per_day=10_000)))
    async with running_door(tmp_path, models=MODELS, keys_file=keys) as door:
        await add(door, "small", "small-0", "--lora-modules", "poet=/loras/poet")
        for model, wanted in (("poet", 200), ("small", 200), ("none", 404), ("large", 503), ("", 503)):
            status, answer, _ = await door.post("/v1/completions", completion(model), headers=headers("a"))
            assert status == wanted, (model, answer)


async def test_who_waits_for_one_model_holds_up_no_other(tmp_path: Path) -> None:
    async with running_door(tmp_path, models=MODELS, replica_requests_max=1) as door:
        await add(door, "large", "large-0")
        await add(door, "small", "small-0")
        large = door.fleets.first.admission
        assert large is not None
        await large.enter("somebody", NORMAL, 1)
        waiting = asyncio.create_task(door.post("/v1/completions", completion("large")))
        await until(lambda: large.shown().waiting_requests == 1)
        assert (await door.post("/v1/completions", completion("small")))[0] == 200
        large.leave()
        assert (await waiting)[0] == 200


async def test_a_response_is_found_on_the_replica_of_its_model(door: Door) -> None:
    made = (await door.post("/v1/responses", {"model": "small", "input": "hello"}))[1]
    again = {"model": "small", "input": "more", "previous_response_id": made["id"]}
    status, answer, sent = await door.post("/v1/responses", again)
    assert (status, sent.get("x-peerkv-replica")) == (200, "small-0"), json.dumps(answer)
    status, answer, _ = await door.post("/v1/responses", {**again, "model": "large"})
    assert status == 404
