"""POST and DELETE /kv/prefixes over stand-ins for engines: what they are asked, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from engine.fleet import ReplicaState
from gateway.admin.app import build_app
from gateway.admin.offline_document import NobodyControlled
from gateway.kept_prefixes.book import KeptPrefixBook
from gateway.kept_prefixes.keeper import Keeper
from gateway.kept_prefixes.prefix_reader import PrefixReader
from gateway.ledger.ledger import Ledger
from gateway.ledger.recorder import Recorder
from gateway.planner.planner import Planner
from gateway.planner.promotions import NoTiers
from gateway.prompts.parity import KindVerdict, Parity, ParityVerdict
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService
from gateway.settings import Settings, Tenant
from gateway.stats.view import prefix_report
from gateway.tenants.access import AdminAccess
from gateway.tenants.salts import tenant_salt
from gateway.tenants.tenants import ANONYMOUS, Tenants
from gateway.upstream.pool import Upstream
from gateway.upstream.served_models import ModelsCache
from tests.unit.gateway.planner.planned_fleet import EXACT, Bounds
from tests.unit.gateway.prompts.tiny_model import make_model
from tests.unit.gateway.running_door import FakeSight, until
from tests.unit.transport.replica_tables import BLOCK_SIZE, ReplicaTables, StandingFleet, replica_tables
from transport.table.deliveries import Delivery
from transport.table.directory import TableDirectory

IDS = list(range(2, 42))
ONE, TWO = Tenant(name="one", api_key="key-of-one"), Tenant(name="two", api_key="key-of-two")
SECRET = b"a secret of tests"
SALT = tenant_salt(SECRET, ONE.name)
WANTED = {"ids": IDS, "tenant": "one"}


class Engine:
    """Answers completions, holds their prompts from then on, and tells of it in its table."""

    def __init__(self, name: str, tables: ReplicaTables) -> None:
        self.name = name
        self.bodies: list[dict[str, Any]] = []
        self.status = 200
        self.refuses_pins = False
        self.resets = True
        self.seconds = 0.0
        self.tables = tables
        tables.start(name)

    @property
    def hints(self) -> list[dict[str, Any]]:
        return [body["kv_transfer_params"]["peerkv"] for body in self.bodies]

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        await asyncio.sleep(self.seconds)
        hint = body["kv_transfer_params"]["peerkv"]
        writer, tokens = self.tables.writers[self.name], len(body["prompt"])
        peer = 36 if hint.get("source") else 0
        record = Delivery(hint["tag"], 1, 1, 2, 3, tokens, 0, peer, tokens - peer, source=hint.get("source", ""))
        writer.deliver(record, "shared_memory")
        self.tables.hold(self.name, body["prompt"], body.get("cache_salt", ""))
        if "pin" in hint:
            writer.count("pins_refused" if self.refuses_pins else "pins")
        return web.json_response({"choices": []}, status=self.status)

    async def reset(self, request: web.Request) -> web.Response:
        return web.json_response({"success": self.resets})

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}, {"id": "poet", "root": "/loras/poet", "parent": "m"}]})


class Scene:
    def __init__(self, tables: ReplicaTables, directory: Path, settings: Settings) -> None:
        self.directory = directory
        self.fleet = StandingFleet("a", "b", directory=directory)
        self.engines = {name: Engine(name, tables) for name in ("a", "b")}
        tokens = TokenService(TokenizerSource(str(make_model(directory / "model"))))
        tokens.load()
        upstream, tenants = Upstream(settings), Tenants([ONE, TWO], salt_secret=SECRET)
        self.upstream = upstream
        models = ModelsCache(self.fleet, upstream)
        self.planner = Planner(self.fleet, TableDirectory(tables.directory), tokens, Bounds(), lambda: models.known)
        self.planner.prompts.parity = EXACT
        recorder = Recorder(Ledger(10), self.planner)
        self.recorder, self.ledger = recorder, recorder.ledger
        self.now = 1000.0
        self.keeper = Keeper(
            KeptPrefixBook(settings.prefixes_kept_max, settings.prefixes_kept_tokens_max),
            fleet=self.fleet,
            planner=self.planner,
            upstream=upstream,
            reader=PrefixReader(self.planner, tokens, tenants, models),
            tenants=tenants,
            recorder=recorder,
            seconds_max=settings.prefix_seconds_max,
            pin_share_max=settings.pin_share_max,
            wall_clock=lambda: self.now,
        )
        app = build_app(
            fleets=[self.fleet],
            upstream=upstream,
            figures=FakeSight(),
            access=AdminAccess(settings.admin_key),
            keeper=self.keeper,
            replicas=NobodyControlled(),
            body_bytes_max=settings.body_bytes_max,
            draining=lambda: False,
        )
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")

    async def listen(self, stack: AsyncExitStack) -> None:
        for name, engine in self.engines.items():
            app = web.Application(client_max_size=1 << 30)
            app.add_routes([web.post("/v1/completions", engine.complete), web.get("/v1/models", engine.models)])
            app.add_routes([web.post("/reset_prefix_cache", engine.reset)])
            runner = web.AppRunner(app)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            socket = str(self.directory / f"{name}.sock")
            await web.UnixSite(runner, socket).start()
            self.fleet.set(name, socket=socket)

    async def keep(self, **wanted: Any) -> Any:
        answer = await self.client.post("/kv/prefixes", json={**WANTED, **wanted})
        assert answer.status_code == 201, answer.text
        return answer.json()

    async def refusal(self, **wanted: Any) -> tuple[int, str | None, str | None]:
        """Status, code and param of a request that is refused."""
        given = {name: value for name, value in {**WANTED, **wanted}.items() if value is not None}
        answer = await self.client.post("/kv/prefixes", json=given)
        error = answer.json()["error"]
        return answer.status_code, error["code"], error["param"]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    async with AsyncExitStack() as stack:
        tables = stack.enter_context(replica_tables(tmp_path / "tables"))

        async def made(**values: Any) -> Scene:
            scene = Scene(tables, tmp_path, Settings(**values))
            await scene.listen(stack)
            stack.push_async_callback(scene.upstream.close)
            stack.push_async_callback(scene.client.aclose)
            return scene

        yield made


@pytest.fixture
async def scene(make: Callable[..., Any]) -> Scene:
    made: Scene = await make()
    return made


async def test_a_prefix_is_computed_pinned_and_shown(scene: Scene) -> None:
    kept = await scene.keep(ttl=60)
    (place,) = kept["places"]
    assert (place["state"], place["computed_tokens"]) == ("pinned", 40)
    assert (kept["tokens"], kept["expires"] - kept["created"]) == (40, 60)
    (body,) = scene.engines[place["replica"]].bodies
    assert (body["prompt"], body["max_tokens"], body["cache_salt"]) == (IDS, 1, SALT)
    (hint,) = scene.engines[place["replica"]].hints
    assert hint["pin"] == {"id": int(kept["id"], 16), "seconds": 60.0}
    assert [each.id for each in scene.keeper.all()] == [kept["id"]]
    assert scene.planner.in_flight() == {}


async def test_what_only_the_keeper_needs_is_shown_nowhere(scene: Scene) -> None:
    kept = await scene.keep(ttl=60, renew=True)
    shown = {"id", "tenant", "model", "tokens", "whole_tokens", "pin", "renew", "ttl", "created", "expires", "places"}
    assert kept.keys() == shown
    report = prefix_report(scene.planner.prefixes, 10, lambda keys: [[] for _ in keys], scene.keeper.all())
    assert report.model_dump(mode="json")["kept"] == [kept]


async def test_a_second_replica_imports_from_the_first(scene: Scene) -> None:
    kept = await scene.keep(replicas=2)
    first, second = kept["places"]
    assert (first["source"], second["source"]) == ("", first["replica"])
    assert (second["state"], second["peer_tokens"]) == ("pinned", 36)
    assert scene.engines[second["replica"]].hints[0]["source"] == first["replica"]


async def test_it_is_put_where_it_already_is(scene: Scene) -> None:
    await scene.keep(pin=False)
    (holder,) = [name for name, engine in scene.engines.items() if engine.bodies]
    kept = await scene.keep()
    assert [place["replica"] for place in kept["places"]] == [holder]


async def test_an_adapters_prefix_is_put_where_that_adapters_blocks_are(scene: Scene) -> None:
    tables = scene.engines["a"].tables
    tables.hold("a", IDS, SALT)
    tables.hold("b", IDS, SALT, lora="poet=/loras/poet")
    homes = {model: (await scene.keep(model=model, pin=False))["places"][0]["replica"] for model in ("", "poet")}
    assert homes == {"": "a", "poet": "b"}


async def test_without_a_pin_it_is_only_warm(scene: Scene) -> None:
    kept = await scene.keep(pin=False)
    (place,) = kept["places"]
    assert place["state"] == "warm"
    assert "pin" not in scene.engines[place["replica"]].hints[0]
    answer = (await scene.client.delete(f"/kv/prefixes/{kept['id']}")).json()
    assert (answer["unpinned"], answer["failed"]) == ([], {})


async def test_a_refused_pin_is_shown(scene: Scene) -> None:
    for engine in scene.engines.values():
        engine.refuses_pins = True
    kept = await scene.keep()
    (place,) = kept["places"]
    assert place["state"] == "refused"
    assert "raise --pin-share-max" in place["reason"]


class Below(NoTiers):
    """Disk and vault, which note what is pinned there: {number: (keys of each kind, seconds)}."""

    def __init__(self) -> None:
        self.pins: dict[int, tuple[list[bytes], float]] = {}

    def pin(self, number: int, chains: Iterable[tuple[bytes, bytes]], seconds: float) -> None:
        self.pins[number] = [keys for _, keys in chains], seconds

    def unpin(self, number: int) -> None:
        self.pins.pop(number, None)


async def test_a_pinned_prefix_is_kept_on_the_disk_too_and_so_are_all_its_whole_blocks(scene: Scene) -> None:
    below = scene.planner.promotions.tiers = Below()
    kept = await scene.keep(ids=IDS, ttl=60)
    chain = scene.planner.registry.look_up(scene.planner.fleet.now(), [*IDS, 7], SALT)
    assert below.pins == {int(kept["id"], 16): ([each.raw for each, _ in chain.chains], 60)}
    assert [each.blocks * size for each, size in chain.chains] == [len(IDS)]
    await scene.client.delete(f"/kv/prefixes/{kept['id']}")
    assert below.pins == {}


async def test_what_is_not_pinned_anywhere_is_not_pinned_on_the_disk_either(scene: Scene) -> None:
    below = scene.planner.promotions.tiers = Below()
    await scene.keep(pin=False)
    for engine in scene.engines.values():
        engine.refuses_pins = True
    await scene.keep()
    assert below.pins == {}


async def test_whole_blocks_alone_are_kept(scene: Scene) -> None:
    kept = await scene.keep(ids=[*IDS, 1])
    assert (kept["tokens"], kept["whole_tokens"]) == (41, 40)


def tell_pinned(scene: Scene, name: str, blocks: int) -> None:
    scene.engines[name].tables.writers[name].tell_load((0, 0, 0, 0, 0, blocks))


async def test_a_pin_that_fits_nowhere_is_refused_before_it_is_computed(make: Callable[..., Any]) -> None:
    scene = await make(pin_share_max=0.05)  # of 256 blocks
    answer = await scene.client.post("/kv/prefixes", json={**WANTED, "ids": [7] * 52})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "pin_too_large")
    for words in ("needs 13 more blocks of 4 tokens", "may take 12 blocks", "0 are taken", "--no-pin"):
        assert words in error["message"]
    assert all(engine.bodies == [] for engine in scene.engines.values())
    assert scene.keeper.all() == []
    await scene.keep(ids=[7] * 52, pin=False)
    await scene.keep(ids=[7] * 48)


async def test_a_pin_goes_where_there_is_room_and_shares_what_is_pinned(make: Callable[..., Any]) -> None:
    scene = await make(pin_share_max=0.05)
    (first,) = (await scene.keep())["places"]
    tell_pinned(scene, first["replica"], 10)
    (longer,) = (await scene.keep(ids=[*IDS, *range(8)]))["places"]  # two blocks more
    assert longer["replica"] == first["replica"]
    (second,) = (await scene.keep(ids=[7] * 12))["places"]
    assert second["replica"] != first["replica"]
    tell_pinned(scene, first["replica"], 12)
    answer = await scene.client.post("/kv/prefixes", json={**WANTED, "ids": [7] * 12, "replicas": 2})
    assert "needs 3 more blocks" in answer.json()["error"]["message"]
    assert "12 are taken" in answer.json()["error"]["message"]


async def test_pins_whose_time_is_up_take_no_room_though_an_idle_engine_counts_them(make: Callable[..., Any]) -> None:
    scene = await make(pin_share_max=0.05)
    for place in (await scene.keep(replicas=2, ttl=60))["places"]:
        tell_pinned(scene, place["replica"], 10)
    scene.now += 61
    await scene.keep(ids=[7] * 48)


async def test_delete_unpins_and_forgets(scene: Scene) -> None:
    kept = await scene.keep(replicas=2)
    answer = (await scene.client.delete(f"/kv/prefixes/{kept['id']}")).json()
    assert sorted(answer["unpinned"]) == ["a", "b"]
    for engine in scene.engines.values():
        assert engine.hints[-1]["unpin"] == [int(kept["id"], 16)]
        assert len(engine.bodies[-1]["prompt"]) == 1
    assert scene.keeper.all() == []
    answer = await scene.client.delete(f"/kv/prefixes/{kept['id']}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "prefix_not_found")


async def test_a_replica_that_can_not_be_told_is_named(scene: Scene) -> None:
    kept = await scene.keep()
    (place,) = kept["places"]
    scene.fleet.set(place["replica"], ReplicaState.STARTING)
    answer = (await scene.client.delete(f"/kv/prefixes/{kept['id']}")).json()
    assert answer["failed"].keys() == {place["replica"]}


async def test_a_replica_that_fails_is_passed_over_for_another(scene: Scene) -> None:
    scene.engines["a"].status = scene.engines["b"].status = 500
    assert await scene.refusal() == (503, "unavailable", None)
    assert scene.keeper.all() == []
    scene.engines["b"].status = 200
    kept = await scene.keep()
    assert {place["replica"]: place["state"] for place in kept["places"]}["b"] == "pinned"


async def test_a_replica_that_takes_too_long_is_given_up(make: Callable[..., Any]) -> None:
    scene = await make(prefix_seconds_max=0.05)
    for engine in scene.engines.values():
        engine.seconds = 5.0
    answer = await scene.client.post("/kv/prefixes", json=WANTED)
    assert (answer.status_code, "0.05 s" in answer.text) == (503, True)
    assert scene.planner.in_flight() == {}


async def test_texts_and_messages_are_tokenised_as_their_requests_are(scene: Scene) -> None:
    text = "the quick brown fox " * 3
    answer = await scene.client.post("/kv/prefixes", json={"text": text, "tenant": "one"})
    assert answer.status_code == 201, answer.text
    messages = [{"role": "system", "content": text}]
    answer = await scene.client.post("/kv/prefixes", json={"messages": messages, "tenant": "one"})
    assert answer.status_code == 201, answer.text
    prompts = [body["prompt"] for engine in scene.engines.values() for body in engine.bodies]
    completion = await scene.planner.plan("completions", {"prompt": text}, ANONYMOUS)
    chat = {"messages": [*messages, {"role": "user", "content": "Hello"}]}
    chat_plan = await scene.planner.plan("chat", chat, ANONYMOUS)
    assert prompts[0] == list(completion.request.known.ids or ())
    assert prompts[1] == list(chat_plan.request.known.ids or ())[: len(prompts[1])]


async def test_ids_that_may_not_be_the_engines_are_refused(scene: Scene) -> None:
    scene.planner.prompts.parity = ParityVerdict(KindVerdict(Parity.DEGRADED), KindVerdict(Parity.OFF))
    assert await scene.refusal(ids=None, text="hello") == (409, "token_ids_unknown", None)
    assert await scene.refusal(ids=None, messages=[{"role": "user", "content": "x"}]) == (409, "token_ids_unknown", None)
    await scene.keep()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"ids": None}, (400, None, None)),
        ({"text": "both"}, (400, None, None)),
        ({"ids": [1, -1]}, (400, None, None)),
        ({"ids": [1, "2"]}, (400, None, "ids.1")),
        ({"ids": [1] * (BLOCK_SIZE - 1)}, (400, "prefix_too_short", None)),
        ({"tools": []}, (400, None, None)),
        ({"tenant": "three"}, (400, "unknown_tenant", "tenant")),
        ({"tenant": None}, (400, None, "tenant")),
        ({"replicas": 0}, (400, None, "replicas")),
        ({"replicas": 3}, (400, None, "replicas")),
        ({"ttl": 0}, (400, None, "ttl")),
        ({"ttl": 1e9}, (400, None, "ttl")),
        ({"pin": "yes"}, (400, None, "pin")),
        ({"colour": "red"}, (400, None, "colour")),
    ],
)
async def test_a_wrong_request_is_a_clear_refusal(
    scene: Scene, wanted: dict[str, Any], expected: tuple[int, str | None, str | None]
) -> None:
    assert await scene.refusal(**wanted) == expected
    assert scene.keeper.all() == []


async def test_the_book_and_the_body_are_bounded(make: Callable[..., Any]) -> None:
    scene = await make(prefixes_kept_max=1, body_bytes_max=1024)
    await scene.keep()
    assert await scene.refusal() == (409, "too_many_prefixes", None)
    answer = await scene.client.post("/kv/prefixes", content=b"[" * 2000)
    assert answer.status_code == 413
    answer = await scene.client.post("/kv/prefixes", content=b"{")
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_without_a_ready_replica_nothing_is_kept(scene: Scene) -> None:
    for name in ("a", "b"):
        scene.fleet.set(name, ReplicaState.STARTING)
    assert (await scene.refusal())[:2] == (503, "no_replica_ready")


async def test_strangers_can_keep_nothing(make: Callable[..., Any]) -> None:
    scene = await make(admin_key="the-admin-key")
    assert (await scene.client.post("/kv/prefixes", json=WANTED)).status_code == 401
    assert (await scene.client.delete("/kv/prefixes/0")).status_code == 401
    assert all(engine.bodies == [] for engine in scene.engines.values())


async def test_a_pin_is_renewed_before_its_time_only_if_asked(scene: Scene) -> None:
    once, renewed = await scene.keep(ttl=100), await scene.keep(ids=[7] * 40, ttl=100, renew=True)
    sent = sum(len(engine.bodies) for engine in scene.engines.values())
    task = asyncio.create_task(scene.keeper.run())
    try:
        scene.now += 85
        await until(lambda: sum(len(engine.bodies) for engine in scene.engines.values()) > sent)
    finally:
        task.cancel()
    last = [
        engine.hints[-1]["pin"] for engine in scene.engines.values() if engine.bodies and engine.bodies[-1]["prompt"][0] == 7
    ]
    assert last == [{"id": int(renewed["id"], 16), "seconds": 100.0}]
    expires = {kept.id: kept.expires for kept in scene.keeper.all()}
    assert expires == {once["id"]: 1100.0, renewed["id"]: 1185.0}


async def test_a_pin_that_went_with_its_replica_is_put_back_if_it_is_to_be_renewed(scene: Scene) -> None:
    kept = await scene.keep(renew=True)
    (place,) = kept["places"]
    before = {name: len(engine.hints) for name, engine in scene.engines.items()}

    def pinned_anew() -> list[dict[str, Any]]:
        return [hint["pin"] for name, engine in scene.engines.items() for hint in engine.hints[before[name] :] if "pin" in hint]

    task = asyncio.create_task(scene.keeper.run())
    try:
        await until(lambda: place["replica"] in scene.keeper._pids)
        scene.fleet.set(place["replica"], pid=4711)
        await until(pinned_anew)
    finally:
        task.cancel()
    assert [pin["id"] for pin in pinned_anew()] == [int(kept["id"], 16)]


async def test_a_flush_takes_pins_which_are_put_back_only_if_they_are_renewed(scene: Scene) -> None:
    once, renewed = await scene.keep(), await scene.keep(ids=[7] * 40, renew=True)
    flushed = await scene.client.post("/kv/flush")
    assert (flushed.status_code, flushed.json()["prefixes"]) == (200, {"kept": 2, "renewed": 1})
    places = {kept.id: kept.places for kept in scene.keeper.all()}
    assert [(place.state, place.reason) for each in places.values() for place in each] == [
        ("failed", "its cache was flushed"),
        ("failed", "its cache was flushed"),
    ]
    again = await scene.client.post("/kv/flush")
    assert again.json()["prefixes"] == {"kept": 0, "renewed": 0}
    task = asyncio.create_task(scene.keeper.run())
    try:
        await until(lambda: any(place.state == "pinned" for place in scene.keeper.book.get(renewed["id"], scene.now).places))
    finally:
        task.cancel()
    assert [place.state for place in scene.keeper.book.get(once["id"], scene.now).places] == ["failed"]


async def test_a_flush_that_fails_ends_pins_alone(scene: Scene) -> None:
    pinned, warm = await scene.keep(), await scene.keep(ids=[7] * 40, pin=False)
    for engine in scene.engines.values():
        engine.resets = False
    flushed = await scene.client.post("/kv/flush")
    assert (flushed.status_code, flushed.json()["prefixes"]) == (502, {"kept": 1, "renewed": 0})
    states = {kept.id: kept.places[0].state for kept in scene.keeper.all()}
    assert states == {pinned["id"]: "failed", warm["id"]: "warm"}
