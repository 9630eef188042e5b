"""A gateway that remembers which replica was asked what, for tests of `peerkv bench`; nothing is computed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

MODEL = "caching-model"
BLOCK_SIZE = 16
TOKENS_A_WORD = 2
REPLICAS = ("replica-0", "replica-1")


@dataclass
class CachingGateway:
    """`key` is the admin key it wants, `forgets` the prompts' kinds of hit that never come about."""

    key: str = ""
    forgets: frozenset[str] = frozenset()
    incompatible: dict[str, list[str]] = field(default_factory=dict)
    status: int = 200
    url: str = ""
    held: dict[str, set[str]] = field(default_factory=lambda: {name: set() for name in REPLICAS})
    asked: list[tuple[str, str]] = field(default_factory=list)
    tokens: dict[str, int] = field(
        default_factory=lambda: {"local": 0, "peer_shared_memory": 0, "peer_cuda_ipc": 0, "computed": 0}
    )

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.get("/ready", self._ready), web.get("/v1/models", self._models), web.get("/kv/stats", self._stats)])
        app.add_routes([web.post("/v1/completions", self._complete)])
        return app

    async def _ready(self, request: web.Request) -> web.Response:
        return web.json_response({"ready": True, "replicas": [{"name": name, "ready": True} for name in REPLICAS]})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": MODEL, "max_model_len": 4096}]})

    async def _stats(self, request: web.Request) -> web.Response:
        if not self._admits(request):
            return web.json_response({"error": {}}, status=401)
        replica: dict[str, Any] = {
            "device": "cpu",
            "block_size": BLOCK_SIZE,
            "exchanges": "ok",
            "incompatible": self.incompatible,
        }
        replicas = [{"name": name, **replica} for name in REPLICAS]
        return web.json_response({"gateway": {"version": "9"}, "replicas": replicas, "totals": {"tokens": self.tokens}})

    def _admits(self, request: web.Request) -> bool:
        return not self.key or request.headers.get("authorization") == f"Bearer {self.key}"

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        replica = request.headers.get("x-peerkv-replica", "")
        if replica and not self._admits(request):
            return web.json_response({"error": {"message": "no"}}, status=403)
        if self.status != 200:
            return web.json_response({"error": {"message": "as you asked"}}, status=self.status)
        prompt, count = body["prompt"], len(body["prompt"].split()) * TOKENS_A_WORD
        self.asked.append((replica, prompt))
        local, peer = self._cached(replica or REPLICAS[0], prompt, (count - 1) // BLOCK_SIZE * BLOCK_SIZE)
        for name, tokens in (("local", local), ("peer_shared_memory", peer), ("computed", count - local - peer)):
            self.tokens[name] += tokens
        if not body.get("stream"):
            return web.json_response({"choices": [{"text": "w"}]})
        response = web.StreamResponse(headers={"x-peerkv-cache": f"local={local}, peer={peer}, computed=0, reason=none"})
        await response.prepare(request)
        usage = {"prompt_tokens": count, "completion_tokens": body["max_tokens"]}
        for event in ({"choices": [{"text": "w"}]}, {"choices": [], "usage": usage}):
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    def _cached(self, replica: str, prompt: str, whole: int) -> tuple[int, int]:
        here = prompt in self.held[replica]
        elsewhere = any(prompt in held for name, held in self.held.items() if name != replica)
        self.held[replica].add(prompt)
        if here and "local" not in self.forgets:
            return whole, 0
        return (0, whole) if elsewhere and not here and "peer" not in self.forgets else (0, 0)


@contextlib.asynccontextmanager
async def serving(gateway: CachingGateway) -> AsyncIterator[CachingGateway]:
    """Serve on loopback; `gateway.url` is filled in."""
    runner = web.AppRunner(gateway.app())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    sockets = runner.addresses
    gateway.url = f"http://127.0.0.1:{sockets[0][1]}"
    try:
        yield gateway
    finally:
        await runner.cleanup()
