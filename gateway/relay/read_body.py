"""From the bytes of a body to what planning looks at, and to what makes a replica's body of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gateway.api.body import check_body, decode_body
from gateway.api.encodings import as_utf8
from gateway.api.endpoints import Endpoint
from gateway.prompts.prompt_reader import KnownPrompt
from gateway.relay.engine_body import EngineBody, engine_body, spliced_body
from gateway.relay.forms import FormBody
from gateway.relay.large_bodies.pool import LargeBodies
from gateway.tenants.tenants import TenantContext

Known = tuple[KnownPrompt, int]
"""A prompt that was read, and the place of the fleet that it was read for."""
Looked = tuple[dict[str, Any], Known | None, Callable[[Sequence[Any] | None], EngineBody | FormBody]]
"""The fields that planning looks at, the prompt if it was read too, and what makes a replica's body with another prompt."""


def read_small(endpoint: Endpoint, raw: bytes | bytearray) -> Looked:
    """Decode a body here. Raises ApiError."""
    raw = as_utf8(raw)
    body = decode_body(raw)
    untouched = raw if check_body(endpoint, body) else None
    return body, None, lambda prompt: engine_body(body, untouched, prompt)


async def read_large(bodies: LargeBodies, endpoint: Endpoint, raw: bytes | bytearray, tenant: TenantContext) -> Looked:
    """Have a body read in another process. Raises ApiError."""
    fleet, body, known, span = await bodies.read(endpoint, raw, tenant.salt)
    return body, (known, fleet), lambda prompt: spliced_body(raw, span, prompt)
