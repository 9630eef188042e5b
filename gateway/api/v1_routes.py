"""The routes of `/v1/*` for the OpenAPI document alone: gateway/relay/frontdoor.py serves them before FastAPI sees them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path

from gateway.api.shapes import (
    ChatCompletionAnswer,
    ChatCompletionRequest,
    CompletionAnswer,
    CompletionRequest,
    EmbeddingAnswer,
    EmbeddingRequest,
    ErrorAnswer,
    ModelCard,
    ModelList,
)

router = APIRouter(prefix="/v1", tags=["openai"])


async def _relayed_headers(
    request_id: Annotated[
        str | None, Header(description="1 to 128 of A-Z a-z 0-9 . _ -; comes back in the answer", alias="x-request-id")
    ] = None,
    replica: Annotated[
        str | None, Header(description="serve on this replica and no other (needs admin rights)", alias="x-peerkv-replica")
    ] = None,
    patience: Annotated[
        str | None,
        Header(
            description="seconds from the request's arrival to the first byte of its answer: a stream that has begun goes on; "
            "503 `queue_full` or 504 `deadline_exceeded` when they are over",
            alias="x-request-timeout",
            pattern=r"^[0-9]{1,9}(\.[0-9]{1,9})?$",
            examples=["5"],
        ),
    ] = None,
    quality: Annotated[
        Literal["exact", "lossy"] | None,
        Header(description="exact: no KV that was kept with loss, although the key accepts it", alias="x-peerkv-quality"),
    ] = None,
) -> None:
    """The headers of every request that is passed on."""


TAKES_HEADERS = [Depends(_relayed_headers)]

_REQUEST_ID = {"schema": {"type": "string"}, "description": "as sent, or a new one; the gateway's log names it"}
_REPLICA = {"schema": {"type": "string"}, "description": "the replica that answered; absent when none did"}
_CACHE = {
    "schema": {"type": "string"},
    "description": "where the KV of the prompt's tokens came from, as structured fields: `local`, `peer`, `computed` "
    "(tokens), `source` (the replica, host memory, disk or vault that `peer` came from; of several the first, and then all in "
    "`sources` with the tokens from each in `source_tokens`) and `reason` (why it was not more; `none` too for prompts shorter "
    "than a block); absent when not known in time",
    "example": 'local=0, peer=1984, computed=16, source="replica-1", reason=none',
}
_QUALITY = {
    "schema": {"type": "string", "enum": ["lossy"]},
    "description": "there if the answer may rest on KV that was kept with loss; absent otherwise",
}
_LIMITS = {
    f"x-ratelimit-{what}-{of}": {
        "schema": {"type": "string" if what == "reset" else "integer"},
        "description": f"{text}, of the {of} limit that has the least left; absent without one for the key",
    }
    for what, text in (("limit", "how much"), ("remaining", "how much is left"), ("reset", "until all of it is, as in 6m0s"))
    for of in ("requests", "tokens")
}
_BEFORE_ANY_REQUEST = 431  # refused while its head comes in, before it has an id


def headers_of(status: int, *, relayed: bool) -> dict[str, Any]:
    """The headers of an answer; `relayed` ones may come from a replica."""
    if status == _BEFORE_ANY_REQUEST:
        return {}
    headers = {"x-request-id": _REQUEST_ID} | ({"x-peerkv-replica": _REPLICA} if relayed else {})
    if relayed and status == 200:
        headers |= {"x-peerkv-cache": _CACHE, "x-peerkv-quality": _QUALITY}
    if status != 401:
        headers |= _LIMITS
    if status in (429, 502, 503):
        headers["retry-after"] = {"schema": {"type": "integer"}, "description": "seconds; the same request may work then"}
    return headers


def _errors(*statuses: int, relayed: bool) -> dict[int | str, dict[str, Any]]:
    why = {
        400: "The request is malformed",
        401: "No or a wrong API key, or one that has expired or was revoked",
        403: "The caller may not choose the replica (`x-peerkv-replica`), or use this endpoint",
        404: "Unknown model, or one that the API key may not use, or an endpoint that the served model does not have",
        408: "The body did not come in time",
        413: "The body is too large",
        415: "The body is compressed, and not with gzip",
        429: "Too many requests in flight, or a limit of the API key is reached (`rate_limit_exceeded`), or its budget "
        "(`insufficient_quota`)",
        431: "The request's head is too large",
        500: "The gateway or the replica failed on this request",
        502: "The replica was lost",
        503: "No replica is ready, the queue is full or too slow for the request (`queue_full`), or the gateway is stopping",
        504: "The replica did not begin its answer in time (`replica_timeout`), or not before `x-request-timeout` was over "
        "(`deadline_exceeded`)",
    }
    return {
        status: {"model": ErrorAnswer, "description": why[status], "headers": headers_of(status, relayed=relayed)}
        for status in statuses
    }


RELAYED = _errors(400, 401, 403, 404, 408, 413, 415, 429, 431, 500, 502, 503, 504, relayed=True)
GENERATION: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or with `stream` server-sent events that end with `data: [DONE]`",
        "content": {"text/event-stream": {}},
        "headers": headers_of(200, relayed=True),
    },
    **RELAYED,
}
_EMBEDDINGS: dict[int | str, dict[str, Any]] = {200: {"headers": headers_of(200, relayed=True)}, **RELAYED}
_MODELS: dict[int | str, dict[str, Any]] = {
    200: {"headers": headers_of(200, relayed=False)},
    **_errors(401, 429, 431, 500, 503, relayed=False),
}
_MODEL = _MODELS | _errors(404, relayed=False)


class ServedElsewhere(RuntimeError):
    """These functions are never called."""


@router.post("/completions", summary="Complete a prompt", responses=GENERATION, dependencies=TAKES_HEADERS)
async def completions(body: CompletionRequest) -> CompletionAnswer:
    raise ServedElsewhere


@router.post("/chat/completions", summary="Answer a chat", responses=GENERATION, dependencies=TAKES_HEADERS)
async def chat_completions(body: ChatCompletionRequest) -> ChatCompletionAnswer:
    raise ServedElsewhere


@router.post(
    "/embeddings",
    summary="Embed texts, where the model can",
    responses=_EMBEDDINGS,
    dependencies=TAKES_HEADERS,
)
async def embeddings(body: EmbeddingRequest) -> EmbeddingAnswer:
    raise ServedElsewhere


@router.get("/models", summary="What is served", responses=_MODELS)
async def models() -> ModelList:
    raise ServedElsewhere


@router.get("/models/{model}", summary="One of the served models", responses=_MODEL)
async def model(model: Annotated[str, Path(description="its id, which may contain slashes")]) -> ModelCard:
    raise ServedElsewhere
