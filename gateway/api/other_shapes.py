"""Requests and answers of the endpoints beside OpenAI's older ones, as the OpenAPI document shows them. They check nothing."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from gateway.api.shapes import ChatMessage, Shape, Usage


class ResponsesRequest(Shape):
    input: str | list[dict[str, Any]] = Field(description="a text, or messages and other items", examples=["Hello!"])
    model: str | None = Field(None, description="one of /v1/models; missing: the served model")
    instructions: str | None = Field(None, description="a system message")
    max_output_tokens: int | None = None
    previous_response_id: str | None = Field(
        None,
        description="go on from a response, where replicas keep them: it has to be this tenant's, on a replica still there",
    )
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = Field(None, description="the format of the answer")
    store: bool | None = None


class ResponsesUsage(Shape):
    input_tokens: int
    output_tokens: int
    total_tokens: int


class ResponsesAnswer(Shape):
    id: str
    object: Literal["response"]
    model: str
    status: str
    output: list[dict[str, Any]]
    usage: ResponsesUsage | None = None


class CountTokensRequest(Shape):
    model: str = Field(description="one of /v1/models")
    messages: list[ChatMessage] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(ge=1, description="tokens to generate at most")
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None


class MessagesUsage(Shape):
    input_tokens: int = Field(description="prompt tokens that neither came from a cache nor were kept in one")
    output_tokens: int
    cache_creation_input_tokens: int | None = Field(None, description="prompt tokens that were computed, and kept in a cache")
    cache_read_input_tokens: int | None = Field(None, description="prompt tokens that came from a cache")


class MessagesAnswer(Shape):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None = None
    usage: MessagesUsage | None = None


class CountTokensAnswer(Shape):
    input_tokens: int


class MessagesErrorDetail(BaseModel):
    type: str = Field(examples=["invalid_request_error"])
    message: str
    code: str | None = Field(None, description="the gateway's own word for what is wrong")
    param: str | None = Field(None, description="the field that is wrong")


class MessagesErrorAnswer(BaseModel):
    """Anthropic's error form."""

    type: Literal["error"]
    error: MessagesErrorDetail


class TokenizeRequest(Shape):
    """A `prompt`, or `messages` that the chat template is applied to."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeAnswer(Shape):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Shape):
    model: str | None = None
    tokens: list[int]


class DetokenizeAnswer(Shape):
    prompt: str


class RerankRequest(Shape):
    query: str | dict[str, Any]
    documents: list[str | dict[str, Any]]
    model: str | None = None
    top_n: int = Field(0, ge=0, description="best documents to return; 0: all")


class RerankAnswer(Shape):
    id: str
    model: str | None
    results: list[dict[str, Any]]
    usage: Usage


class ScoreRequest(Shape):
    """Texts to compare, as `text_1` and `text_2`, or as `queries` and `documents`."""

    model: str | None = None
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None


class Score(Shape):
    index: int
    object: Literal["score"]
    score: float


class ScoreAnswer(Shape):
    id: str
    model: str | None
    data: list[Score]
    usage: Usage


class PoolingRequest(Shape):
    """An `input`, or `messages` that the chat template is applied to."""

    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]] | None = None
    messages: list[ChatMessage] | None = None
    task: str | None = None


class PoolingAnswer(Shape):
    id: str
    model: str | None
    data: list[dict[str, Any]]
    usage: Usage


class AudioAnswer(Shape):
    text: str
