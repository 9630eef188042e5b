"""The routes of `/v1/*` for the OpenAPI document alone: gateway/frontdoor.py serves them before FastAPI sees them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Path

from gateway.shapes import (
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

RequestId = Annotated[
    str | None, Header(description="1 to 128 of A-Z a-z 0-9 . _ -; comes back in the answer", alias="x-request-id")
]
Pin = Annotated[
    str | None, Header(description="serve on this replica and no other (needs admin rights)", alias="x-peerkv-replica")
]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    why = {
        400: "The request is malformed",
        401: "No or a wrong API key",
        404: "Unknown model",
        413: "The body is too large",
        429: "Too many requests in flight",
        502: "The replica was lost",
        503: "No replica is ready",
    }
    return {status: {"model": ErrorAnswer, "description": why[status]} for status in statuses}


_GENERATION: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or with `stream` server-sent events that end with `data: [DONE]`",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "headers": {
            "x-request-id": {"schema": {"type": "string"}},
            "x-peerkv-replica": {"schema": {"type": "string"}, "description": "the replica that served it"},
        },
    },
    **_errors(400, 401, 404, 413, 429, 502, 503),
}


class ServedElsewhere(RuntimeError):
    """These functions are never called."""


@router.post("/completions", summary="Complete a prompt", responses=_GENERATION)
async def completions(body: CompletionRequest, request_id: RequestId = None, replica: Pin = None) -> CompletionAnswer:
    raise ServedElsewhere


@router.post("/chat/completions", summary="Answer a chat", responses=_GENERATION)
async def chat_completions(
    body: ChatCompletionRequest, request_id: RequestId = None, replica: Pin = None
) -> ChatCompletionAnswer:
    raise ServedElsewhere


@router.post(
    "/embeddings",
    summary="Embed texts, where the model can",
    responses=_errors(400, 401, 404, 413, 429, 502, 503),
)
async def embeddings(body: EmbeddingRequest, request_id: RequestId = None, replica: Pin = None) -> EmbeddingAnswer:
    raise ServedElsewhere


@router.get("/models", summary="What is served", responses=_errors(401, 503))
async def models() -> ModelList:
    raise ServedElsewhere


@router.get("/models/{model}", summary="One of the served models", responses=_errors(401, 404, 503))
async def model(model: Annotated[str, Path(description="its id, which may contain slashes")]) -> ModelCard:
    raise ServedElsewhere
