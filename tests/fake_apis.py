"""What `fake_engine.py` answers on vLLM's endpoints beside OpenAI's older ones: Responses, Messages, scores, forms.

The answer to a prompt is "w0 w1 …", and a token is a byte of the prompt's text, as in `fake_engine.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    from tests.fake_engine import FakeEngine

Json = dict[str, Any]
SSE_HEADERS = {"content-type": "text/event-stream; charset=utf-8"}


def text_of(value: Any) -> str:
    """All texts in a value, one behind the other."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(text_of, value))
    if isinstance(value, dict):
        return "".join(text_of(value[name]) for name in ("content", "text", "input_text") if name in value)
    return ""


class OtherApis:
    """Handlers of one fake server."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self.kept: dict[str, Json] = {}
        """Responses by id; vLLM keeps them only if it is told to."""

    def _must_fit(self, tokens: int) -> None:
        """Raise ValueError for more tokens than the context holds, which vLLM refuses too."""
        if tokens > self._engine.context_tokens:
            raise ValueError(f"{tokens} tokens are more than the context holds")

    def routes(self) -> list[web.RouteDef]:
        handlers: dict[str, Callable[[web.Request], Any]] = {
            "/v1/responses": self.responses,
            "/v1/messages": self.messages,
            "/v1/messages/count_tokens": self.count_tokens,
            "/detokenize": self.detokenize,
            "/pooling": self.pooling,
            "/score": self.score,
            "/v1/score": self.score,
            "/rerank": self.rerank,
            "/v1/rerank": self.rerank,
            "/v1/audio/transcriptions": self.audio,
            "/v1/audio/translations": self.audio,
        }
        return [web.post(path, handler) for path, handler in handlers.items()]

    async def responses(self, request: web.Request) -> web.StreamResponse:
        body = await self._engine._record(request)
        former = body.get("previous_response_id")
        if former is not None and former not in self.kept:
            error = {"message": f"Response with id '{former}' not found.", "type": "invalid_request_error"}
            return web.json_response({"error": {**error, "param": "response_id", "code": 404}}, status=404)
        count, cut = body.get("max_output_tokens") or 4, bool(body.get("max_output_tokens"))  # it never ends earlier by itself
        prompt = len(text_of(body["input"]).encode())
        self._must_fit(count)
        usage = {"input_tokens": prompt, "output_tokens": count, "total_tokens": prompt + count}
        usage["input_tokens_details"] = {"cached_tokens": 1}
        text = "".join(f"w{i} " for i in range(count))
        item = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
        item["content"] = [{"type": "output_text", "text": text, "annotations": []}]
        told = {name: body.get(name) for name in ("metadata", "tools")}
        whole = {
            "id": body["request_id"],
            "object": "response",
            "created_at": 1,
            "model": body.get("model") or self._engine.models[0],
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        }
        whole |= {"output": [item], "usage": usage, "parallel_tool_calls": True, "tool_choice": "auto"}
        whole |= {"tools": told["tools"] or [], "metadata": told["metadata"] or {}}
        self.kept[whole["id"]] = whole
        if not body.get("stream"):
            return web.json_response(whole)
        response = web.StreamResponse(headers=SSE_HEADERS)
        await response.prepare(request)
        events: list[Json] = [{"type": "response.created", "response": {**whole, "usage": None, "output": []}}]
        place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        part = {"type": "output_text", "text": "", "annotations": []}
        events.append({"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}})
        events.append({"type": "response.content_part.added", **place, "part": part})
        delta = {"type": "response.output_text.delta", **place}
        events += [{**delta, "delta": f"w{i} ", "logprobs": []} for i in range(count)]
        events.append({"type": "response.completed", "response": whole})
        for number, event in enumerate(events):
            if number == (body.get("fake") or {}).get("after"):
                assert request.transport is not None
                request.transport.abort()
            await _send(response, event["type"], {**event, "sequence_number": number})
        return response

    async def messages(self, request: web.Request) -> web.StreamResponse:
        body = await self._engine._record(request)
        if status := (body.get("fake") or {}).get("status"):
            error = {"type": "BadRequestError", "message": "as you asked"}
            return web.json_response({"type": "error", "error": error}, status=status)
        count, prompt = body["max_tokens"], len((text_of(body.get("system")) + text_of(body["messages"])).encode())
        self._must_fit(count)
        usage = {
            "input_tokens": prompt - 1,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 1,
            "output_tokens": count,
        }
        text = "".join(f"w{i} " for i in range(count))
        whole = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "stop_reason": "max_tokens"}
        whole |= {"content": [{"type": "text", "text": text}], "stop_sequence": None, "usage": usage}
        if not body.get("stream"):
            return web.json_response(whole)
        response = web.StreamResponse(headers=SSE_HEADERS)
        await response.prepare(request)
        start = {**whole, "content": [], "stop_reason": None, "usage": {"input_tokens": prompt, "output_tokens": 0}}
        await _send(response, "message_start", {"type": "message_start", "message": start})
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        await _send(response, "content_block_start", block)
        for i in range(count):
            if i == (body.get("fake") or {}).get("after"):
                assert request.transport is not None
                request.transport.abort()
            delta = {"type": "text_delta", "text": f"w{i} "}
            await _send(response, "content_block_delta", {"type": "content_block_delta", "index": 0, "delta": delta})
        await _send(response, "content_block_stop", {"type": "content_block_stop", "index": 0})
        end = {"stop_reason": "max_tokens", "stop_sequence": None}
        await _send(response, "message_delta", {"type": "message_delta", "delta": end, "usage": usage})
        await _send(response, "message_stop", {"type": "message_stop"})
        return response

    async def count_tokens(self, request: web.Request) -> web.Response:
        body = await self._engine._record(request)
        return web.json_response({"input_tokens": len((text_of(body.get("system")) + text_of(body["messages"])).encode())})

    async def detokenize(self, request: web.Request) -> web.Response:
        body = await self._engine._record(request)
        return web.json_response({"prompt": bytes(body["tokens"]).decode()})

    async def pooling(self, request: web.Request) -> web.Response:
        body = await self._engine._record(request)
        data = [{"index": 0, "object": "pooling", "data": [0.5, -0.5]}]
        return web.json_response(self._pooled(body, len(text_of(body.get("input")))) | {"data": data})

    async def score(self, request: web.Request) -> web.Response:
        body = await self._engine._record(request)
        tokens = len(text_of(body.get("text_1"))) + len(text_of(body.get("text_2")))
        return web.json_response(self._pooled(body, tokens) | {"data": [{"index": 0, "object": "score", "score": 0.5}]})

    async def rerank(self, request: web.Request) -> web.Response:
        body = await self._engine._record(request)
        texts = body["documents"]
        results = [{"index": i, "document": {"text": text}, "relevance_score": 0.5} for i, text in enumerate(texts)]
        tokens = len(body["query"]) * len(texts) + len(text_of(texts))
        return web.json_response(self._pooled(body, tokens) | {"results": results})

    def _pooled(self, body: Json, tokens: int) -> Json:
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"id": "pool-0", "object": "list", "created": 1, "model": body.get("model"), "usage": usage}

    async def audio(self, request: web.Request) -> web.Response:
        fields: Json = {}
        async for part in await request.multipart():
            assert not isinstance(part, type(None))
            content = await part.read()  # type: ignore[union-attr]
            fields[part.name or ""] = len(content) if part.filename else content.decode()  # type: ignore[union-attr]
        self._engine.seen["requests"].append({"path": request.path, "body": fields, "headers": {}})
        return web.json_response({"text": "w0 w1", "usage": {"type": "duration", "seconds": 1}})


async def _send(response: web.StreamResponse, event: str, data: Json) -> None:
    await response.write(f"event: {event}\ndata: {json.dumps(data)}\n\n".encode())
