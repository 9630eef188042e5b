"""The endpoints that are passed on to replicas, and what each one takes, in one table; the admins' paths. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Endpoint = Literal[
    "completions", "chat", "responses", "messages", "count_tokens", "embeddings", "pooling", "score", "rerank", "tokenize",
    "detokenize", "audio",
]  # fmt: skip
Work = Literal["generates", "pools", "counts"]
Dialect = Literal["openai", "responses", "anthropic"]


class Traits(NamedTuple):
    """What an endpoint is.

    `paths` are vLLM's own, `prompt` is the field of the body that it is planned by, "" for none. `work`: "generates" tokens,
    "pools" a prompt's states into numbers, or "counts" tokens, for which the engine itself is not asked. `bound` is the field
    that bounds an answer's tokens.
    """

    paths: tuple[str, ...]
    work: Work
    prompt: str = ""
    bound: str = ""
    dialect: Dialect = "openai"
    is_form: bool = False
    """The body is a form with a file in it, for which vLLM has no field for a salt."""

    @property
    def generates(self) -> bool:
        """Whether its answers are generated, and may be streamed."""
        return self.work == "generates"

    @property
    def takes_hint(self) -> bool:
        """Whether its requests have kv_transfer_params: what vLLM pools it computes whole."""
        return self.work == "generates" and not self.is_form

    @property
    def takes_salt(self) -> bool:
        """Whether its requests have a cache_salt. What only counts tokens leaves nothing in a cache, and needs none."""
        return self.work != "counts" and not self.is_form

    @property
    def takes_priority(self) -> bool:
        """Whether its requests have a priority, which the Messages API has not."""
        return self.takes_salt and self.dialect != "anthropic"


ENDPOINTS: Mapping[Endpoint, Traits] = {
    "completions": Traits(("/v1/completions",), "generates", "prompt", "max_tokens"),
    "chat": Traits(("/v1/chat/completions",), "generates", "messages", "max_completion_tokens"),
    "responses": Traits(("/v1/responses",), "generates", "input", "max_output_tokens", "responses"),
    "messages": Traits(("/v1/messages",), "generates", "messages", "max_tokens", "anthropic"),
    "count_tokens": Traits(("/v1/messages/count_tokens",), "counts", "messages", dialect="anthropic"),
    "embeddings": Traits(("/v1/embeddings",), "pools", "input"),
    "pooling": Traits(("/pooling",), "pools", "input"),
    "score": Traits(("/v1/score", "/score"), "pools"),
    "rerank": Traits(("/v1/rerank", "/rerank"), "pools"),
    "tokenize": Traits(("/tokenize",), "counts"),
    "detokenize": Traits(("/detokenize",), "counts"),
    "audio": Traits(("/v1/audio/transcriptions", "/v1/audio/translations"), "generates", is_form=True),
}
ADMIN_PATHS = ("/kv/", "/metrics", "/replicas")
"""How the paths begin that the admin rule guards (gateway/tenants/access.py), and no others."""
PATHS: Mapping[str, Endpoint] = {path: endpoint for endpoint, traits in ENDPOINTS.items() for path in traits.paths}
