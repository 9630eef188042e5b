"""POST and DELETE /kv/prefixes: prefixes that somebody wants kept.

FastAPI would read a body of any size, before it asks who sends it; so it is read here, after the admin rule and bounded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Path, Request
from pydantic import ValidationError

from gateway.api.shapes import ErrorAnswer
from gateway.errors import BodyTooLarge, InvalidRequest
from gateway.kept_prefixes.book import KeptPrefixAnswer
from gateway.kept_prefixes.shapes import FlushedPrefixes, PrefixRemoved, PrefixRequest


class PrefixKeeper(Protocol):
    """Keeps prefixes in the replicas' caches."""

    async def keep(self, wanted: PrefixRequest) -> KeptPrefixAnswer:
        """Put a prefix where it is wanted. Raises ApiError."""
        ...

    async def undo(self, prefix_id: str) -> PrefixRemoved:
        """Forget a prefix and end its pins. Raises UnknownPrefix."""
        ...

    def flushed(self, emptied: Iterable[str], tried: Iterable[str]) -> FlushedPrefixes:
        """Note that these replicas' caches were emptied, or that it was tried, which ends pins all the same."""
        ...


def add_prefix_routes(router: APIRouter, keeper: PrefixKeeper, body_bytes_max: int) -> None:
    """Add the routes to the admin router."""

    def errors(**why: str) -> dict[int | str, dict[str, Any]]:
        return {int(status.removeprefix("s")): {"model": ErrorAnswer, "description": text} for status, text in why.items()}

    @router.post(
        "/kv/prefixes",
        status_code=201,
        summary="Keep a prefix in the caches of some replicas, pinned or not",
        responses=errors(
            s400="The request is malformed, the prefix shorter than a block or longer than the context, or its pin too large",
            s409="As many prefixes are kept as may be, or token ids are not known to be the engine's",
            s413="The body is too large",
            s503="No replica is ready, or none took it",
        ),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": PrefixRequest.model_json_schema()}},
            }
        },
    )
    async def keep(request: Request) -> KeptPrefixAnswer:
        return await keeper.keep(_wanted(await _read(request, body_bytes_max)))

    @router.delete(
        "/kv/prefixes/{prefix_id}",
        summary="Keep a prefix no longer",
        responses=errors(s404="No such prefix is kept (any more)"),
    )
    async def undo(prefix_id: Annotated[str, Path(max_length=64)]) -> PrefixRemoved:
        return await keeper.undo(prefix_id)


async def _read(request: Request, bytes_max: int) -> bytes:
    """The body. Raises BodyTooLarge."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > bytes_max:
            raise BodyTooLarge(bytes_max)
    return bytes(body)


def _wanted(body: bytes) -> PrefixRequest:
    """Raises InvalidRequest that names the field."""
    try:
        return PrefixRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidRequest(f"'{name}': {message}" if name else message, param=name or None) from None
