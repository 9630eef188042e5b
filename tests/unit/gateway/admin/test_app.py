"""The admin endpoints and the server's own bounds, over real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop

from engine.fleet import ReplicaState
from gateway.api.endpoints import ADMIN_PATHS
from gateway.errors import UnknownModel
from gateway.stats.shapes import KvStats
from tests.unit.gateway.running_door import Door, FakeSight, running_door, until

ADMIN = [
    ("GET", "/kv/explain/known"),
    ("GET", "/metrics"),
    ("GET", "/kv/stats"),
    ("GET", "/kv/prefixes"),
    ("POST", "/kv/flush"),
    ("GET", "/replicas"),
    ("POST", "/replicas/replica-0/drain"),
    ("POST", "/replicas/replica-0/resume"),
    ("POST", "/replicas/replica-0/restart"),
]


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with running_door(tmp_path) as door:
        yield door


async def status_of(door: Door, method: str, path: str, **headers: str) -> int:
    async with door.session.request(method, door.url + path, headers=headers) as answer:
        return answer.status


async def raw(door: Door, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to these bytes, after which the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(data)
    async with asyncio.timeout(10):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


async def test_health_says_that_the_gateway_lives_without_any_replica(door: Door) -> None:
    assert (await door.get("/health"))[:2] == (200, {"status": "ok"})


async def test_not_ready_without_replicas(door: Door) -> None:
    status, body, headers = await door.get("/ready")
    assert (status, body["ready"], body["reason"]) == (503, False, "there are no replicas: `peerkv engine` starts them")
    assert int(headers["retry-after"]) > 0


async def test_ready_with_one_replica_says_why_not_the_others(door: Door) -> None:
    await door.add_engine("replica-0")
    door.fleet.put("replica-1", "/nowhere", ReplicaState.BACKOFF, "killed by SIGKILL")
    status, body, _ = await door.get("/ready")
    assert (status, body["ready"]) == (200, True)
    assert [(r["name"], r["ready"], r["reason"]) for r in body["replicas"]] == [
        ("replica-0", True, ""),
        ("replica-1", False, "killed by SIGKILL"),
    ]


async def test_what_keeps_replicas_apart_is_asked_once_for_all_models(tmp_path: Path) -> None:
    class Warned(FakeSight):
        asked = 0

        def warnings(self) -> list[str]:
            self.asked += 1
            return ["no table"]

    sight = Warned()
    async with running_door(tmp_path, sight=sight, models=("large", "small")) as door:
        _, body, _ = await door.get("/ready")
    assert ([each["model"] for each in body["models"]], body["warnings"]) == (["large", "small"], ["no table"])
    assert sight.asked == 1


async def test_whoever_asks_for_a_model_that_there_is_not_learns_of_no_other(tmp_path: Path) -> None:
    class Placed(FakeSight):
        def place(self, model: str) -> int:
            raise UnknownModel(model, ["large", "poet"])

    async with running_door(tmp_path, sight=Placed()) as door:
        status, body, _ = await door.get("/ready?model=none")
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert "poet" not in body["error"]["message"]


async def test_not_ready_while_stopping(door: Door) -> None:
    await door.add_engine("replica-0")
    await door.relay.drain(1)
    status, body, _ = await door.get("/ready")
    assert (status, body["reason"]) == (503, "the gateway is stopping")


@pytest.mark.parametrize(("method", "path"), ADMIN)
async def test_admin_endpoints_are_open_to_callers_on_this_machine(door: Door, method: str, path: str) -> None:
    await door.add_engine("replica-0")
    assert await status_of(door, method, path) in (200, 202)


@pytest.mark.parametrize(("method", "path"), ADMIN)
async def test_admin_endpoints_are_closed_behind_a_proxy(door: Door, method: str, path: str) -> None:
    assert await status_of(door, method, path, **{"x-forwarded-for": "127.0.0.1"}) == 403


@pytest.mark.parametrize(("method", "path"), ADMIN)
async def test_admin_endpoints_want_the_admin_key_where_there_is_one(tmp_path: Path, method: str, path: str) -> None:
    async with running_door(tmp_path, admin_key="the-admin-key") as door:
        await door.add_engine("replica-0")
        assert await status_of(door, method, path) == 401
        assert await status_of(door, method, path, authorization="Bearer the-admin-kez") == 401
        assert await status_of(door, method, path, authorization="Bearer the-admin-key") in (200, 202)


async def test_no_admin_endpoint_of_the_document_lacks_the_rule(door: Door) -> None:
    _, document, _ = await door.get("/openapi.json")
    found = [
        (method.upper(), path.format(request_id="x", prefix_id="x", name="x"))
        for path, operations in document["paths"].items()
        for method, told in operations.items()
        if "admin" in told["tags"] and path not in ("/health", "/ready")
    ]
    assert {method for method, _ in found} == {"GET", "POST", "DELETE"}
    assert all(path.startswith(ADMIN_PATHS) for _, path in found)
    assert {each: await status_of(door, *each, via="1.1 proxy") for each in found} == dict.fromkeys(found, 403)


async def test_flush_resets_every_ready_replica_and_its_shared_blocks(door: Door) -> None:
    await door.add_engine("replica-0")
    await door.add_engine("replica-1", "--fake-reset-fails")
    door.fleet.put("replica-2", "/nowhere", ReplicaState.STARTING)
    status, body, _ = await door.post("/kv/flush")
    assert (status, body["flushed"], body["failed"].keys()) == (502, ["replica-0"], {"replica-1"})
    assert (await door.seen("replica-0"))["resets"] == [{"reset_external": "true"}]


async def test_flush_without_a_ready_replica_is_503(door: Door) -> None:
    status, body, _ = await door.post("/kv/flush")
    assert (status, body["error"]["code"]) == (503, "no_replica_ready")


async def test_a_wrong_query_has_openais_error_form(door: Door) -> None:
    status, body, _ = await door.get("/kv/prefixes?limit=many")
    assert (status, body["error"]["param"], body["error"]["type"]) == (400, "limit", "invalid_request_error")


@pytest.mark.parametrize("path", ["/", "/nope", "/v1", "/v1/nope", "/docs", "//v1/completions"])
async def test_an_unknown_path_has_openais_error_form(door: Door, path: str) -> None:
    status, body, headers = await door.get(path)
    assert (status, body["error"]["code"]) == (404, "unknown_url")
    assert ("/ui" in body["error"]["message"]) == (path == "/")
    assert headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/completions", "POST"),
        ("GET", "/v1/completions/", "POST"),
        ("DELETE", "/v1/models/x", "GET"),
        ("POST", "/health", "GET, HEAD"),
        ("GET", "/kv/flush", "POST"),
    ],
)
async def test_a_wrong_method_names_the_right_ones(door: Door, method: str, path: str, allowed: str) -> None:
    async with door.session.request(method, door.url + path) as answer:
        assert (answer.status, answer.headers["allow"]) == (405, allowed)
        assert (await answer.json())["error"]["code"] == "method_not_allowed"


async def test_the_server_does_not_name_itself(door: Door) -> None:
    assert "server" not in (await door.get("/health"))[2]


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "endless"])
async def test_a_head_over_the_bound_is_431(tmp_path: Path, complete: bool) -> None:
    async with running_door(tmp_path, header_bytes_max=8192) as door:
        data = b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-big: " + b"x" * 9000 + (b"\r\n\r\n" if complete else b"")
        status, headers, body = await raw(door, data)
        assert (status, json.loads(body)["error"]["code"]) == (431, "head_too_large")
        assert len(headers["x-request-id"]) == 32


async def test_a_big_body_with_its_head_in_one_piece_is_no_big_head(tmp_path: Path) -> None:
    async with running_door(tmp_path, header_bytes_max=4096) as door:
        body = b'{"prompt": "' + b"x" * 9000 + b'"}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
        status, _, answer = await raw(door, head + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert (status, json.loads(answer)["error"]["code"]) == (503, "no_replica_ready")


async def test_what_is_not_http_has_openais_error_form(door: Door) -> None:
    status, headers, body = await raw(door, b"\x00\x01 nonsense\r\n\r\n")
    assert (status, headers["connection"]) == (400, "close")
    assert json.loads(body)["error"]["code"] == "invalid_http"
    assert len(headers["x-request-id"]) == 32


async def test_a_refused_head_keeps_the_clients_request_id(tmp_path: Path) -> None:
    async with running_door(tmp_path, header_bytes_max=8192) as door:
        data = b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-request-id: mine-1\r\nx-big: " + b"x" * 9000 + b"\r\n\r\n"
        status, headers, _ = await raw(door, data)
        assert (status, headers["x-request-id"]) == (431, "mine-1")


async def test_a_defect_in_an_admin_endpoint_is_counted_and_a_500(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(figures: FakeSight) -> KvStats:
        raise ZeroDivisionError

    monkeypatch.setattr(FakeSight, "stats", broken)
    status, body, _ = await door.get("/kv/stats")
    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert door.relay.counters.internal_errors == 1


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_accepted_connections_send_without_delay(tmp_path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def connected() -> list[int]:
        async with running_door(tmp_path) as door:
            assert (await door.get("/health"))[0] == 200
            sockets = [c.transport.get_extra_info("socket") for c in door.server.server_state.connections]
            return [found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for found in sockets]

    with asyncio.Runner(loop_factory=new_loop) as runner:
        found = runner.run(connected())
    assert found
    assert all(found)


async def test_a_head_that_does_not_come_closes_the_connection(tmp_path: Path) -> None:
    async with running_door(tmp_path, keep_alive_seconds=0.2) as door:
        for sent in (b"", b"GET /health HT"):
            reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
            writer.write(sent)
            async with asyncio.timeout(5):
                assert await reader.read() == b""
            writer.close()


async def test_connections_over_the_bound_get_503(tmp_path: Path) -> None:
    async with running_door(tmp_path, connections_max=2) as door:
        held = [await asyncio.open_connection("127.0.0.1", door.port) for _ in range(2)]
        # The server may take them in a moment after they were made.
        for _, writer in held:
            writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        for reader, _ in held:
            assert b" 200 " in await reader.readline()
        status, headers, body = await raw(door, b"")
        assert (status, json.loads(body)["error"]["code"]) == (503, "unavailable")
        assert headers["retry-after"]
        for _, writer in held:
            writer.close()


async def test_a_client_that_does_not_read_is_cut_off_and_its_request_cancelled(tmp_path: Path) -> None:
    async with running_door(tmp_path, client_stall_seconds_max=0.2) as door:
        await door.add_engine("replica-0")
        body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 100_000_000}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", door.port, limit=1024)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: door.relay.counters.clients_left == 1)

        async def aborted() -> bool:
            return len((await door.seen("replica-0"))["aborted"]) == 1

        await until(aborted)
        writer.close()


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/ready", 503), ("/health/", 200)])
async def test_head_gives_the_status_without_a_body(door: Door, path: str, status: int) -> None:
    for _ in range(2):  # the connection stays usable
        async with door.session.head(door.url + path) as answer:
            assert answer.status == status
            assert answer.headers["content-type"] == "application/json"
            assert await answer.read() == b""
