"""A stand-in for vLLM servers that costs next to nothing: `python -m bench.backend`.

Each replica listens on a TCP port and on a unix socket. A completion gets a canned answer, whole or as EVENTS events that are
written one by one. Each replica has a block table, where it reports what it delivered. A request whose `user` is PROOF is
decoded, and its answer contains the SHA-256 of the prompt's text, which proves that a proxy forwards prompts unchanged.

The TCP ports have no /tokenize route: vllm-router 0.1.17 with cache_aware would ask for every prompt's ids there, and the time
of the stand-in's tokenizer would be counted against it. So it goes by the text.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import httptools
import msgspec
import uvloop
from tokenizers import Tokenizer

from bench.cases import EVENTS, MODEL, PATHS
from bench.mock_replicas import Holders
from gateway.prompts.tokenizer.engine_options import source_from_arguments
from gateway.prompts.tokenizer.service import NoTokenIds, TokenService

PROOF = "prove-the-prompt"
CONTEXT_TOKENS = 1 << 20
WHOLE = (
    b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"bench-model","choices":[{"index":0,"text":"%s",'
    % (b"word " * EVENTS)
    + b'"logprobs":null,"finish_reason":"length"}],"usage":{"prompt_tokens":40,"completion_tokens":32,"total_tokens":72}}'
)
_EVENT = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"bench-model",'
    b'"choices":[{"index":0,"text":"word ","logprobs":null,"finish_reason":null,"stop_reason":null,'
    b'"prompt_token_ids":null,"token_ids":%b}]}\n\n'
)
EVENT = _EVENT % b"null"
"""As clients get it: ids of tokens are the gateway's own wish."""
WANTS_IDS = b'"return_token_ids":true'
DONE = b"data: [DONE]\n\n"


def _answer(body: bytes, status: bytes = b"200 OK") -> bytes:
    head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_WHOLE = _answer(WHOLE)
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENTS = {False: _chunk(EVENT), True: _chunk(_EVENT % b"[1234]")}
_STREAM_END = _chunk(DONE) + b"0\r\n\r\n"
_CARDS: list[dict[str, Any]] = [
    {"id": MODEL, "object": "model", "owned_by": "vllm", "root": MODEL, "max_model_len": CONTEXT_TOKENS}
]
_FIXED: dict[bytes, bytes] = {
    b"/v1/models": msgspec.json.encode({"object": "list", "data": _CARDS}),
    b"/version": b'{"version":"0.32.0"}',
    b"/get_model_info": msgspec.json.encode({"model_path": MODEL, "is_generation": True, "served_model_name": MODEL}),
    b"/get_server_info": msgspec.json.encode({"model_path": MODEL, "served_model_name": MODEL, "dp_size": 1}),
    b"/server_info": msgspec.json.encode({"model_path": MODEL, "served_model_name": MODEL, "dp_size": 1}),
}


class Engine:
    """What one replica answers besides canned completions; `requests` counts the canned ones."""

    def __init__(self, model: str) -> None:
        self.requests = 0
        self._tokens = TokenService(source_from_arguments(model, ()))
        state = self._tokens.load()
        if not state.loaded:
            raise SystemExit(f"bench: {model}: {state.reason}")
        self._tokenizer = Tokenizer.from_file(f"{state.directory}/tokenizer.json")

    def answer(self, path: bytes, body: bytes) -> bytes:
        """Return the answer to anything that is not a plain completion."""
        if path == b"/health":
            return _answer(b"")
        if path == b"/tokenize":
            return self._tokenize(msgspec.json.decode(body))
        if path.startswith(b"/v1/") and PROOF.encode() in body:
            return self._proof(msgspec.json.decode(body))
        fixed = _FIXED.get(path)
        return _answer(b'{"error":"no such route"}', b"404 Not Found") if fixed is None else _answer(fixed)

    def _tokenize(self, body: dict[str, Any]) -> bytes:
        try:
            ids = self._tokens.encode(body["prompt"]) if "prompt" in body else self._tokens.encode_chat(body)
        except NoTokenIds as error:
            return _answer(msgspec.json.encode({"error": {"message": str(error)}}), b"400 Bad Request")
        answer = {"tokens": list(ids), "count": len(ids), "max_model_len": CONTEXT_TOKENS}
        return _answer(msgspec.json.encode(answer))

    def _proof(self, body: dict[str, Any]) -> bytes:
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt, skip_special_tokens=False)
        return _answer(msgspec.json.encode({"sha256": hashlib.sha256(text.encode()).hexdigest()}))


class BackendProtocol(asyncio.Protocol):
    """One connection to replica `place`; requests are not pipelined. /tokenize exists only if `tokenizes` is set."""

    def __init__(self, engine: Engine, holders: Holders, place: int, tokenizes: bool, loop: asyncio.AbstractEventLoop) -> None:
        self._engine, self._holders, self._place, self._tokenizes = engine, holders, place, tokenizes
        self._later: Callable[..., Any] = loop.call_soon
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_message_begin(self) -> None:
        self._path = b""
        self._parts = []

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        path = self._path.partition(b"?")[0]
        if path == b"/tokenize" and not self._tokenizes:
            path = b""
        body = b"".join(self._parts)
        ends = body[:256] + body[-1024:]
        if not path.endswith(b"/completions") or PROOF.encode() in ends:
            self._transport.write(self._engine.answer(path, body))
            if not self._parser.should_keep_alive():
                self._transport.close()
            return
        self._engine.requests += 1
        self._holders.deliver(self._place, body)
        if b'"stream":true' in ends or b'"stream": true' in ends:
            self._transport.write(_STREAM_HEAD)
            self._later(self._next_event, EVENTS, _EVENTS[WANTS_IDS in ends])
        else:
            self._transport.write(_WHOLE)

    def _next_event(self, left: int, event: bytes) -> None:
        """Write one event per turn of the loop, so that each is sent separately."""
        if self._transport.is_closing():
            return
        if left:
            self._transport.write(event)
            self._later(self._next_event, left - 1, event)
        else:
            self._transport.write(_STREAM_END)


async def _serve(model: str, holders: Holders, ports: list[int], sockets: list[str]) -> None:
    loop = asyncio.get_running_loop()
    engine = Engine(model)

    def replica(place: int, tokenizes: bool) -> Callable[[], BackendProtocol]:
        return lambda: BackendProtocol(engine, holders, place, tokenizes, loop)

    # Without a reference to it, a server is garbage collected and closes.
    tcp = [await loop.create_server(replica(place, False), "127.0.0.1", port, backlog=1024) for place, port in enumerate(ports)]
    unix = [await loop.create_unix_server(replica(place, True), path, backlog=1024) for place, path in enumerate(sockets)]
    print("ready", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in (*tcp, *unix)))


def main() -> None:
    """Serve until killed; prints "ready"."""
    parser = argparse.ArgumentParser(prog="bench.backend", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="directory with the tokenizer")
    parser.add_argument("--table-dir", type=Path, required=True, help="directory for the replicas' block tables")
    parser.add_argument(
        "--endpoint", choices=tuple(PATHS), default="completions", help="endpoint whose prompts the tables hold"
    )
    parser.add_argument("--port", type=int, action="append", default=[])
    parser.add_argument("--socket", action="append", default=[])
    given = parser.parse_args()
    with closing(Holders(given.table_dir, given.model, given.endpoint)) as holders:
        uvloop.run(_serve(given.model, holders, given.port, given.socket))


if __name__ == "__main__":
    main()
