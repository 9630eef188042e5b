"""Requests and answers of `/v1/*` as the OpenAPI document shows them.

They describe; they check nothing. The relay passes every field on that it does not use itself, so all of them
allow further fields: whatever vLLM takes and gives.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Shape(BaseModel):
    """Fields beyond the documented ones are passed on."""

    model_config = ConfigDict(extra="allow")


class StreamOptions(Shape):
    include_usage: bool = Field(False, description="send the usage as the last chunk")


class Sampling(Shape):
    """What completions and chats have in common."""

    model: str | None = Field(None, description="one of /v1/models; missing: the served model")
    stream: bool = Field(False, description="answer with server-sent events")
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0, description="tokens to generate at most")
    n: int = Field(1, ge=1, description="choices for each prompt")
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = Field(None, description="text, json_object or json_schema")
    user: str | None = None


class CompletionRequest(Sampling):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="a text, token ids, or a list of either", examples=["The capital of France is"]
    )
    echo: bool = Field(False, description="repeat the prompt in front of the answer")
    logprobs: int | None = Field(None, description="log probabilities of so many tokens at each position")
    suffix: str | None = None


class ChatMessage(Shape):
    role: str = Field(examples=["user"])
    content: str | list[dict[str, Any]] | None = Field(None, examples=["Hello!"])


class ChatCompletionRequest(Sampling):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class EmbeddingRequest(Shape):
    input: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


class PromptTokensDetails(Shape):
    cached_tokens: int | None = Field(None, description="tokens whose KV was not computed for this request")


class Usage(Shape):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | None = None
    prompt_tokens_details: PromptTokensDetails | None = None


class CompletionChoice(Shape):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class CompletionAnswer(Shape):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatChoice(Shape):
    index: int
    message: ChatMessage
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class ChatCompletionAnswer(Shape):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Embedding(Shape):
    index: int
    object: Literal["embedding"]
    embedding: list[float] | str


class EmbeddingAnswer(Shape):
    object: Literal["list"]
    model: str | None
    data: list[Embedding]
    usage: Usage


class ModelCard(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str | None = None
    parent: str | None = Field(None, description="the base model of a LoRA adapter")
    max_model_len: int | None = Field(None, description="tokens that prompt and answer may have together")


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(None, description="the field that is wrong")
    code: str | None = Field(None, examples=["model_not_found"])


class ErrorAnswer(BaseModel):
    """OpenAI's error form. The code is a word, if there is one for what is wrong."""

    error: ErrorDetail
