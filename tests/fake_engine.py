"""A stand-in for vLLM's OpenAI server, for tests: `python tests/fake_engine.py --uds PATH [vLLM arguments]`.

It knows vLLM's endpoints and answers fixed words ("w0 w1 …"); a token is a byte of the prompt. Other vLLM
arguments are accepted and ignored. What it saw is at `GET /fake/seen`. A request's body may carry a key `fake`:

    on            only the replica of this name (stem of its socket) obeys the rest
    delay         seconds before the answer's head
    held          no answer before the test sets `let_go` (where the engine is in its own process)
    token_delay   seconds between tokens
    waits         with `--fake-core`: the request arrives there and never gets a step
    die           "before" | "mid": the process exits before the head, or after `after` tokens
    drop          "before" | "mid": the connection is closed instead, the process lives
    after         tokens sent before "mid" (default 2)
    partial       with "drop" "mid": so much of the next event is sent before it, 0 for nothing and 1 for all but its last byte
    status        answer this HTTP status with an error in vLLM's form
    engine_died   answer as vLLM's server does when its engine has ended
    body_bytes    length of the answer's text
    comments      keep-alive comments before a stream's first token, `token_delay` apart
    stream_error  an error event in vLLM's form after so many tokens, in place of the rest
    engine_dies_at  vLLM's words that its engine has ended after so many tokens of a stream, in place of the rest
    aborts_at     the end of a stream that vLLM gives up, as it is stopped, after so many tokens
    error         the error to answer, beside `status`, in place of vLLM's usual one

Arguments of its own: `--fake-start-seconds S` before it listens, `--fake-exit-code N` ends it at start with a
message on stderr (with `--fake-exit-on NAME` only that replica), `--fake-exit-once FILE` only when FILE did not
exist yet, `--fake-reset-fails` has it answer
so to /reset_prefix_cache, `--fake-core` puts the steps into a process of their own with a block table (`fake_core.py`), whose
id is in /fake/seen, `--fake-status N` has every request answered so (with `--fake-exit-on NAME` only that replica),
`--fake-no-embeddings` takes that endpoint away, `--fake-deaf` lets it ignore SIGTERM, and `--fake-strict` lets it
answer 400 to what it cannot read, as vLLM does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it is run as a file too
from tests.fake_apis import OtherApis
from tests.fake_core import CoreLink

Json = dict[str, Any]
CONTEXT_TOKENS = 2048
METRICS = """\
# HELP vllm:request_success_total Count of successfully processed requests.
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="length",model_name="fake-model"} %d
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="fake-model"} %d
# HELP process_open_fds Number of open file descriptors.
# TYPE process_open_fds gauge
process_open_fds 7.0
"""
SSE_HEADERS = {"content-type": "text/event-stream; charset=utf-8"}


def tokens_of(prompt: Any) -> list[int]:
    """The token ids of a text, or of the ids that stand in its place."""
    return list(prompt.encode()) if isinstance(prompt, str) else list(prompt)


FIRST_WORD = 1000
"""The token id of the first word that a fake makes: the next ones follow it, also behind such ids at a prompt's end."""


def asked_of(body: Json) -> Json:
    """What a request asks of the fake itself, in a field of its own or, where others have to look known, in `user`."""
    user = body.get("user")
    return body.get("fake") or (json.loads(user) if isinstance(user, str) and user.startswith("{") else {})


def prompts_of(prompt: Any) -> list[Any]:
    """The prompts of a completion request: one, or a list of texts or of token ids."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return prompt
    return [prompt]


def render(messages: list[Json]) -> str:
    """The fake's chat template."""
    return "".join(f"<{m['role']}>{m.get('content') or ''}</{m['role']}>" for m in messages) + "<assistant>"


def failure(message: str, status: int, kind: str = "BadRequestError", param: str | None = None) -> web.Response:
    """An error in the form that vLLM gives it: the code is the HTTP status."""
    error = {"message": message, "type": kind, "param": param, "code": status}
    return web.json_response({"error": error}, status=status)


@web.middleware
async def strict(request: web.Request, handler: Any) -> Any:
    """Refuse what a handler cannot read, as vLLM refuses it by its models."""
    try:
        return await handler(request)
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        return failure(f"not readable: {type(error).__name__}", 400)


class FakeEngine:
    """State and handlers of one fake server."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.name = Path(args.uds).stem
        self.models = args.served_model_name or [args.model]
        self.root = args.model
        self.loras = [module.split("=")[0] for module in args.lora_modules]
        self.reset_fails = args.fake_reset_fails
        self.core: CoreLink | None = None
        self.status = args.fake_status if args.fake_exit_on in (None, self.name) else None
        self.embeds = not args.fake_no_embeddings
        self.context_tokens = args.max_model_len
        self.metrics_text, self.metrics_delay = "", 0.0
        self.prefix = ""  # of each word
        self.let_go = asyncio.Event()
        self.others = OtherApis(self)
        self.strict = args.fake_strict
        self.seen: Json = {"requests": [], "aborted": [], "finished": 0, "running": 0, "resets": []}

    def app(self) -> web.Application:
        """The aiohttp application with vLLM's routes."""
        app = web.Application(client_max_size=1 << 30, middlewares=[strict] if self.strict else [])
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/fake/seen", self.show_seen),
                web.get("/metrics", self.metrics),
                web.get("/v1/models", self.list_models),
                web.post("/v1/completions", self.completions),
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/embeddings", self.embeddings),
                web.post("/tokenize", self.tokenize),
                web.post("/reset_prefix_cache", self.reset),
                *self.others.routes(),
            ]
        )
        return app

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.metrics_delay)
        text = self.metrics_text or METRICS % (self.seen["finished"], self.seen["running"])
        return web.Response(text=text, content_type="text/plain")

    async def show_seen(self, request: web.Request) -> web.Response:
        return web.json_response({"name": self.name, "pid": os.getpid(), "core": self.core and self.core.pid, **self.seen})

    async def list_models(self, request: web.Request) -> web.Response:
        base = self.models[0]
        cards = [(name, None) for name in self.models] + [(name, base) for name in self.loras]
        data = [
            {
                "id": name,
                "object": "model",
                "created": 1,
                "owned_by": "vllm",
                "root": self.root,
                "parent": parent,
                "max_model_len": self.context_tokens,
            }
            for name, parent in cards
        ]
        return web.json_response({"object": "list", "data": data})

    async def reset(self, request: web.Request) -> web.Response:
        self.seen["resets"].append(dict(request.query))
        return web.json_response({"success": not self.reset_fails})

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        tokens = tokens_of(body["prompt"] if "prompt" in body else render(body["messages"]))
        return web.json_response(
            {"count": len(tokens), "max_model_len": self.context_tokens, "tokens": tokens, "token_strs": None}
        )

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        if not self.embeds:
            return web.json_response({"detail": "Not Found"}, status=404)
        body = await self._record(request)
        inputs = prompts_of(body["input"])
        data = [{"index": i, "object": "embedding", "embedding": [0.5, -0.5]} for i in range(len(inputs))]
        count = sum(len(tokens_of(one)) for one in inputs)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return web.json_response({"id": "embd-0", "object": "list", "model": body.get("model"), "data": data, "usage": usage})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await self._record(request)
        prompts = prompts_of(body.get("prompt"))
        return await self._answer(request, body, prompts, chat=False)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._record(request)
        return await self._answer(request, body, [render(body["messages"])], chat=True)

    async def _record(self, request: web.Request) -> Json:
        body: Json = await request.json()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.seen["requests"].append({"path": request.path, "body": body, "headers": headers})
        return body

    async def _answer(self, request: web.Request, body: Json, prompts: list[Any], *, chat: bool) -> web.StreamResponse:
        asked = asked_of(body)
        asked = asked["by"].get(self.name, {}) if "by" in asked else asked
        asked = asked if asked.get("on", self.name) == self.name else {}
        self.seen["running"] += 1
        try:
            if asked.get("delay"):
                await asyncio.sleep(asked["delay"])
            if asked.get("held"):
                await self.let_go.wait()
            if asked.get("engine_died"):
                return failure("EngineCore encountered an issue. See stack trace (above) for the root cause.", 500)
            if status := asked.get("status", self.status):
                return web.json_response(asked["error"], status=status) if "error" in asked else failure("as you asked", status)
            self._end_here(asked, "before", request)
            counts = [len(tokens_of(prompt)) for prompt in prompts]
            if max(counts) >= self.context_tokens:
                return failure(
                    f"This model's maximum context length is {self.context_tokens} tokens. However, your request "
                    f"has {max(counts)} input tokens.",
                    400,
                )
            answer = Answer(self, request, body, asked, prompts, sum(counts), chat=chat)
            try:
                response = await (answer.stream() if body.get("stream") else answer.whole())
            finally:
                if answer.number and self.core is not None:
                    self.core.end(answer.number)
            self.seen["finished"] += 1
            return response
        except asyncio.CancelledError:
            self.seen["aborted"].append(request.headers.get("x-request-id", ""))
            raise
        finally:
            self.seen["running"] -= 1

    def _end_here(self, asked: Json, when: str, request: web.Request) -> None:
        if asked.get("die") == when:
            os._exit(9)
        if asked.get("drop") == when and asked.get("drop_on", self.name) == self.name:
            assert request.transport is not None
            request.transport.abort()


class Answer:
    """One generated answer, whole or streamed."""

    def __init__(
        self,
        engine: FakeEngine,
        request: web.Request,
        body: Json,
        asked: Json,
        prompts: list[Any],
        prompt_tokens: int,
        *,
        chat: bool,
    ) -> None:
        self.engine, self.request, self.body, self.asked, self.chat = engine, request, body, asked, chat
        self.count = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        self.choices = len(prompts) * (body.get("n") or 1)
        self.prompt_tokens = prompt_tokens
        self.tag = ((body.get("kv_transfer_params") or {}).get("peerkv") or {}).get("tag", 0)
        self.number = 0
        self.prompt_ids = (body.get("kv_transfer_params") or {}).get("prompt_token_ids") or tokens_of(prompts[0])
        if len(prompts) == 1:
            self.prompt_tokens = len(self.prompt_ids)
        last = self.prompt_ids[-1] if self.prompt_ids else 0
        self.first_word = last - FIRST_WORD + 1 if last >= FIRST_WORD else 0
        self.id = ("chatcmpl-" if chat else "cmpl-") + request.headers.get("x-request-id", "none")

    def words(self) -> Iterator[str]:
        """The words of a choice."""
        if "body_bytes" in self.asked:
            yield "x" * self.asked["body_bytes"]
            return
        for i in range(self.first_word, self.first_word + self.count):
            yield f"{self.engine.prefix}w{i} "

    def usage(self) -> Json:
        """vLLM's usage, with `cached_tokens`."""
        done = self.count * self.choices
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": done,
            "total_tokens": self.prompt_tokens + done,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    def frame(self, choices: list[Json], *, chunk: bool) -> Json:
        """The object around the choices."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": self.body.get("model") or self.engine.models[0],
            "system_fingerprint": self.engine.name,
            "choices": choices,
        }

    async def _pause(self, index: int) -> None:
        if (core := self.engine.core) is not None:
            self.number = self.number or core.begin()
            if self.asked.get("waits"):
                core.wait(self.number, self.tag)
                await asyncio.Event().wait()
            await core.step(self.number, self.tag, self.prompt_tokens)
        if index >= self.asked.get("after", 2):
            await self._sent()
            self.engine._end_here(self.asked, "mid", self.request)
        # Also without a delay: a cancelled handler must get to know.
        await asyncio.sleep(self.asked.get("token_delay", 0))

    async def _sent(self) -> None:
        """Wait until what was written is on its way: an abort would throw away what the transport still holds."""
        transport = self.request.transport
        while transport is not None and transport.get_write_buffer_size():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.001)

    async def whole(self) -> web.Response:
        """The answer as one JSON body."""
        text = ""
        for index, word in enumerate(self.words()):
            await self._pause(index)
            text += word
        choices = []
        for i in range(self.choices):
            choice: Json = {"index": i, "finish_reason": "length", "logprobs": None}
            choices.append(choice | ({"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}))
        ids = {"prompt_token_ids": self.prompt_ids} if self.chat and self.body.get("return_token_ids") else {}
        return web.json_response(self.frame(choices, chunk=False) | {"usage": self.usage()} | ids)

    def delta(self, index: int, word: str) -> Json:
        """What a chat's event brings: text, or from a word on that was asked for a tool call's arguments."""
        calls_from = self.asked.get("calls_from", self.count)
        if index < calls_from:
            return {"role": "assistant", "content": word}
        call: Json = {"index": 0, "function": {"arguments": word}}
        if index == calls_from:
            call |= {"id": f"call-of-{self.engine.name}", "type": "function"}
            call["function"]["name"] = "f"
        return {"tool_calls": [call]}

    def event(self, index: int, word: str, choice_index: int = 0) -> Json:
        """What one token of a choice brings."""
        last = index == self.count - 1 or "body_bytes" in self.asked
        choice: Json = {"index": choice_index, "finish_reason": "length" if last else None, "logprobs": None}
        choice |= {"delta": self.delta(index, word)} if self.chat else {"text": word}
        if self.body.get("return_token_ids"):
            choice["token_ids"] = [FIRST_WORD + self.first_word + index]
            choice |= {"prompt_token_ids": self.prompt_ids} if index == 0 and not self.chat else {}
        chunk = self.frame([choice], chunk=True)
        if self.chat and index == 0 and self.body.get("return_token_ids"):
            chunk["prompt_token_ids"] = self.prompt_ids
        return chunk

    def _written(self, data: Json) -> bytes:
        compact = (",", ":") if self.body.get("return_token_ids") else None  # as vLLM does
        return b"data: " + json.dumps(data, separators=compact).encode() + b"\n\n"

    def _partial(self, index: int, word: str, share: float) -> bytes:
        """The beginning of an event that is to break off."""
        whole = self._written(self.event(index, word))
        return whole[: int(share * (len(whole) - 1))]

    async def stream(self) -> web.StreamResponse:
        """The answer as server-sent events, closed by [DONE]."""
        response = web.StreamResponse(headers=SSE_HEADERS)
        await response.prepare(self.request)

        async def send(data: Json) -> None:
            await response.write(self._written(data))

        for _ in range(self.asked.get("comments", 0)):
            await response.write(b": keep-alive\n\n")
            await asyncio.sleep(self.asked.get("token_delay", 0))
        for index, word in enumerate(self.words()):
            if index == self.asked.get("after", 2) and "partial" in self.asked:
                await response.write(self._partial(index, word, self.asked["partial"]))
            await self._pause(index)
            if index == self.asked.get("stream_error"):
                error = {"message": "the engine failed", "type": "InternalServerError", "param": None, "code": 500}
                await send({"error": error})
                break
            if index == self.asked.get("engine_dies_at"):
                text = "EngineCore encountered an issue. See stack trace (above) for the root cause."
                await send({"error": {"message": text, "type": "InternalServerError", "param": None, "code": 500}})
                break
            if index == self.asked.get("aborts_at"):
                given_up: Json = {"index": 0, "logprobs": None, "finish_reason": "abort", "token_ids": None}
                nothing: Json = {"delta": {}} if self.chat else {"text": ""}
                await send(self.frame([given_up | nothing], chunk=True))
                break
            for i in range(self.choices):
                await send(self.event(index, word, i))
        self.engine._end_here(self.asked, "last", self.request)
        if (self.body.get("stream_options") or {}).get("include_usage"):
            await send(self.frame([], chunk=True) | {"usage": self.usage()})
        self.engine._end_here(self.asked, "usage", self.request)
        await response.write(b"data: [DONE]\n\n")
        if self.asked.get("drop") == "done":
            await asyncio.sleep(0.1)  # until that is sent
        self.engine._end_here(self.asked, "done", self.request)
        return response


def arguments(argv: list[str]) -> argparse.Namespace:
    """The arguments that the fake obeys; all others are vLLM's and ignored."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--uds", required=True)
    parser.add_argument("--model", default="fake-model")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--max-model-len", type=lambda n: CONTEXT_TOKENS if n == "auto" else int(n), default=CONTEXT_TOKENS)
    parser.add_argument("--lora-modules", nargs="*", default=[])
    parser.add_argument("--fake-start-seconds", type=float, default=0)
    parser.add_argument("--fake-exit-code", type=int)
    parser.add_argument("--fake-exit-on")
    parser.add_argument("--fake-exit-once")
    parser.add_argument("--fake-core", action="store_true")
    parser.add_argument("--fake-status", type=int)
    parser.add_argument("--fake-reset-fails", action="store_true")
    parser.add_argument("--fake-no-embeddings", action="store_true")
    parser.add_argument("--fake-deaf", action="store_true")
    parser.add_argument("--fake-strict", action="store_true")
    return parser.parse_known_args(argv)[0]


def exit_if_asked(args: argparse.Namespace) -> None:
    """End the process when an argument says so."""
    if args.fake_exit_code is None or args.fake_exit_on not in (None, Path(args.uds).stem):
        return
    if args.fake_exit_once is not None:
        try:
            Path(args.fake_exit_once).touch(exist_ok=False)
        except FileExistsError:
            return
    print("fake engine: cannot start, as you asked", file=sys.stderr, flush=True)
    raise SystemExit(args.fake_exit_code)


async def serve(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    await asyncio.sleep(args.fake_start_seconds)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, (lambda: None) if args.fake_deaf else stop.set)
    engine = FakeEngine(args)
    if args.fake_core:
        engine.core = await CoreLink.open(sys.argv[1:])
    runner = web.AppRunner(engine.app(), handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(args.uds)
    await web.UnixSite(runner, args.uds).start()
    print(f"fake engine listens on {args.uds}", flush=True)
    await stop.wait()
    await runner.cleanup()


if __name__ == "__main__":
    parsed = arguments(sys.argv[1:])
    exit_if_asked(parsed)
    asyncio.run(serve(parsed))
