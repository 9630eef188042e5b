"""The routes beside OpenAI's older ones, for the OpenAPI document alone, as those in v1_routes.py."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, File, Form

from gateway.api.other_shapes import (
    AudioAnswer,
    CountTokensAnswer,
    CountTokensRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    MessagesAnswer,
    MessagesErrorAnswer,
    MessagesRequest,
    PoolingAnswer,
    PoolingRequest,
    RerankAnswer,
    RerankRequest,
    ResponsesAnswer,
    ResponsesRequest,
    ScoreAnswer,
    ScoreRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from gateway.api.v1_routes import GENERATION, RELAYED, TAKES_HEADERS, ServedElsewhere, headers_of

router = APIRouter(tags=["vllm"], dependencies=TAKES_HEADERS)

_PLAIN: dict[int | str, dict[str, Any]] = {200: {"headers": headers_of(200, relayed=True)}, **RELAYED}


def _in_anthropics_form(responses: dict[int | str, dict[str, Any]]) -> dict[int | str, dict[str, Any]]:
    """Those of a head that is refused before its path is looked at have OpenAI's form here too."""
    return {
        status: {**told, "model": MessagesErrorAnswer} if status not in (200, 431) else told
        for status, told in responses.items()
    }


@router.post("/v1/responses", summary="Answer, as OpenAI's Responses API does", responses=GENERATION, tags=["openai"])
async def responses(body: ResponsesRequest) -> ResponsesAnswer:
    raise ServedElsewhere


@router.post(
    "/v1/messages",
    summary="Answer, as Anthropic's Messages API does",
    responses=_in_anthropics_form(GENERATION),
    tags=["anthropic"],
)
async def messages(body: MessagesRequest) -> MessagesAnswer:
    raise ServedElsewhere


@router.post(
    "/v1/messages/count_tokens",
    summary="Count the tokens of a Messages request",
    responses=_in_anthropics_form(_PLAIN),
    tags=["anthropic"],
)
async def count_tokens(body: CountTokensRequest) -> CountTokensAnswer:
    raise ServedElsewhere


@router.post("/tokenize", summary="The token ids of a prompt or a chat", responses=_PLAIN)
async def tokenize(body: TokenizeRequest) -> TokenizeAnswer:
    raise ServedElsewhere


@router.post("/detokenize", summary="The text of token ids", responses=_PLAIN)
async def detokenize(body: DetokenizeRequest) -> DetokenizeAnswer:
    raise ServedElsewhere


@router.post("/v1/rerank", summary="Order documents by a query, where the model can", responses=_PLAIN)
@router.post("/rerank", summary="Order documents by a query, where the model can", responses=_PLAIN)
async def rerank(body: RerankRequest) -> RerankAnswer:
    raise ServedElsewhere


@router.post("/v1/score", summary="Score pairs of texts, where the model can", responses=_PLAIN)
@router.post("/score", summary="Score pairs of texts, where the model can", responses=_PLAIN)
async def score(body: ScoreRequest) -> ScoreAnswer:
    raise ServedElsewhere


@router.post("/pooling", summary="What the model's pooler makes of a text, where it has one", responses=_PLAIN)
async def pooling(body: PoolingRequest) -> PoolingAnswer:
    raise ServedElsewhere


@router.post(
    "/v1/audio/transcriptions", summary="Write speech down, where the model can", responses=GENERATION, tags=["openai"]
)
@router.post(
    "/v1/audio/translations", summary="Write speech down in English, where the model can", responses=GENERATION, tags=["openai"]
)
async def audio(
    file: Annotated[bytes, File(description="the recording")],
    model: Annotated[str | None, Form()] = None,
    language: Annotated[str | None, Form()] = None,
    prompt: Annotated[str | None, Form()] = None,
    response_format: Annotated[str | None, Form()] = None,
    stream: Annotated[bool | None, Form()] = None,
) -> AudioAnswer:
    """Only where no tenants are configured: the engine has no way to keep their caches apart here."""
    raise ServedElsewhere
