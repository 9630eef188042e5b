"""A running gateway as its clients see it: what it serves, its figures, and the time its answers take."""

import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from gateway.cli.elsewhere import port_elsewhere
from gateway.cli.trust import tls_trouble
from gateway.errors import GatewayError

CONTROL_SECONDS_MAX = 30.0
ANSWER_SECONDS_MAX = 600.0
CONTEXT_TOKENS_UNKNOWN = 4096
_CACHE_FIELD = re.compile(r"\b(local|peer)=(\d+)")


class NotMeasured(GatewayError):
    """The installation cannot be measured; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Described:
    """What is measured. `obstacles` says why replicas do not exchange; empty: they do."""

    version: str
    model: str
    context_tokens: int
    replicas: tuple[str, ...]
    device: str
    block_size: int
    obstacles: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; times are seconds since the request was sent."""

    first_seconds: float
    seconds: float
    prompt_tokens: int
    local_tokens: int
    peer_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Prompt tokens of all replicas so far, by source."""

    local: int
    peer: int
    computed: int

    def since(self, before: "PromptTokens") -> "PromptTokens":
        """Return what was added since `before`."""
        return PromptTokens(self.local - before.local, self.peer - before.peer, self.computed - before.computed)


class Installation:
    """A gateway at `url`. `api_key` is a tenant's, `admin_key` for its figures and to choose replicas; empty: none.
    `verify` says how its certificate is checked.

    The holder of the admin key is a tenant too, so requests to a chosen replica are sent in the admin's name.
    """

    def __init__(self, url: str, api_key: str = "", admin_key: str = "", verify: ssl.SSLContext | bool = True) -> None:
        self.url = url.rstrip("/")
        self._verify = verify
        self._api = _bearer(api_key or admin_key)
        self._admin = _bearer(admin_key)
        self._choosing = self._admin or self._api
        self._model = ""

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS_MAX)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0, ssl=self._verify))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def describe(self) -> Described:
        """Return what is being served. Raises NotMeasured."""
        ready = await self._get("/ready", self._admin)
        names = tuple(replica["name"] for replica in ready.get("replicas", ()) if replica["ready"])
        if not names:
            raise NotMeasured(f"no replica of {self.url} is ready: {ready.get('reason') or 'see peerkv doctor'}")
        card = (await self._get("/v1/models", self._api))["data"][0]
        stats = await self._stats()
        self._model = card["id"]
        own = [replica for replica in stats["replicas"] if replica["name"] in names]  # of the first model, if there are several
        return Described(
            version=stats["gateway"]["version"],
            model=self._model,
            context_tokens=card.get("max_model_len") or CONTEXT_TOKENS_UNKNOWN,
            replicas=tuple(replica["name"] for replica in own) or names,
            device=own[0]["device"] if own else "",
            block_size=max((replica["block_size"] for replica in own), default=0) or 16,
            obstacles=_obstacles(own),
        )

    async def prompt_tokens(self) -> PromptTokens:
        """Return the fleet's counts so far. Raises NotMeasured."""
        tokens = (await self._stats())["totals"]["tokens"]
        return PromptTokens(tokens["local"], tokens["peer_shared_memory"] + tokens["peer_cuda_ipc"], tokens["computed"])

    async def round_trip(self) -> float:
        """Time a request that the gateway answers itself, in seconds. Raises NotMeasured."""
        began = time.perf_counter()
        await self._get("/v1/models", self._api)
        return time.perf_counter() - began

    async def ask(self, prompt: str, *, answer_tokens: int, replica: str = "") -> Answer:
        """Stream a greedy completion, from `replica` if given. Raises NotMeasured."""
        headers = self._choosing | {"x-peerkv-replica": replica} if replica else self._api
        body = completion(self._model, prompt, answer_tokens) | {"stream": True, "stream_options": {"include_usage": True}}
        began, first, usage = time.perf_counter(), 0.0, None
        try:
            async with self._session.post(f"{self.url}/v1/completions", json=body, headers=headers) as response:
                if response.status != 200:
                    raise _refused(response.status, await response.text(), pinned=bool(replica))
                cache = response.headers.get("x-peerkv-cache", "")
                async for line in response.content:
                    event = _event(line)
                    if event.get("choices") and not first:
                        first = time.perf_counter() - began
                    usage = event.get("usage") or usage
        except (aiohttp.ClientError, TimeoutError) as error:
            raise NotMeasured(f"a request to {self.url} broke: {error!r}") from error
        if not first or usage is None:
            raise NotMeasured(f"{self.url} ended a stream without tokens or usage: {str(event)[:200]}")
        local, peer = _cached(cache, usage)
        seconds = time.perf_counter() - began
        return Answer(first, seconds, usage["prompt_tokens"], local, peer, usage["completion_tokens"])

    async def whole(self, body: Mapping[str, Any], replica: str) -> float:
        """Time a completion on `replica` without streaming, in seconds. Raises NotMeasured."""
        began = time.perf_counter()
        headers = self._choosing | {"x-peerkv-replica": replica}
        try:
            async with self._session.post(f"{self.url}/v1/completions", json=body, headers=headers) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise NotMeasured(f"a request to {self.url} broke: {error!r}") from error
        if response.status != 200:
            raise _refused(response.status, text, pinned=True)
        return time.perf_counter() - began

    async def _stats(self) -> Mapping[str, Any]:
        return await self._get("/kv/stats", self._admin)

    async def _get(self, path: str, headers: Mapping[str, str]) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=CONTROL_SECONDS_MAX)
        try:
            async with self._session.get(self.url + path, headers=headers, timeout=timeout) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            broke_off = isinstance(error, (aiohttp.ServerDisconnectedError, ConnectionResetError))
            if trouble := tls_trouble(self.url, error, broke_off=broke_off):
                raise NotMeasured(trouble) from error
            raise NotMeasured(
                f"no gateway is answering at {self.url} ({error}): start one with `peerkv serve`, name it with --url, or use "
                f"--start to start one for the measurement{port_elsewhere(self.url)}"
            ) from error
        if response.status in (401, 403):
            which = "an API key: pass --api-key" if path.startswith("/v1/") else "the admin key: pass --admin-key"
            raise NotMeasured(f"{self.url}{path} requires {which}")
        try:
            found: dict[str, Any] = msgspec.json.decode(content, type=dict)
        except msgspec.MsgspecError as error:
            raise NotMeasured(f"{self.url}{path} does not answer like peerkv: status {response.status}") from error
        return found


def completion(model: str, prompt: str, answer_tokens: int) -> dict[str, Any]:
    """Return the body of a greedy completion of exactly this many tokens."""
    return {"model": model, "prompt": prompt, "max_tokens": answer_tokens, "temperature": 0, "ignore_eos": True}


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


def _event(line: bytes) -> dict[str, Any]:
    data = line.removeprefix(b"data:").strip()
    if not line.startswith(b"data:") or data == b"[DONE]":
        return {}
    event: dict[str, Any] = msgspec.json.decode(data, type=dict)
    return event


def _cached(cache: str, usage: Mapping[str, Any]) -> tuple[int, int]:
    """Parse local and peer tokens from the header x-peerkv-cache; without it all cached tokens count as local."""
    found = {name: int(count) for name, count in _CACHE_FIELD.findall(cache)}
    if found:
        return found.get("local", 0), found.get("peer", 0)
    return (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0, 0


def _obstacles(replicas: list[dict[str, Any]]) -> str:
    if len(replicas) < 2:
        return "there is only one replica"
    for replica in replicas:
        if replica["exchanges"] != "ok":
            return f"{replica['name']} exchanges nothing: {replica['exchanges']}"
        for other, fields in replica["incompatible"].items():
            return f"{replica['name']} does not import from {other}: {'; '.join(fields)}"
    return ""


def _refused(status: int, text: str, *, pinned: bool) -> NotMeasured:
    if status in (401, 403) and pinned:
        return NotMeasured(
            "the gateway does not allow choosing the replica, which these measurements need: pass --admin-key, or where it has "
            "none run this on the gateway's machine"
        )
    if status == 401:
        return NotMeasured("the gateway requires an API key: pass --api-key")
    return NotMeasured(f"a request was answered with status {status}: {text[:300]}")
