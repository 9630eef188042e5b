"""Requests whose body is a form with a file: audio to be written down. Only fields known to be harmless are passed on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, parse_options_header

from gateway.api.body import FORBIDDEN_FIELDS
from gateway.errors import InvalidRequest, NotForTenants, UnsupportedParameter
from gateway.tenants.tenants import TenantContext

PARTS_MAX = 64
SMALL_BYTES_MAX = 64 << 10
"""Of a field other than the file."""
FIELDS = frozenset(
    (
        *("file", "model", "language", "prompt", "hotwords", "response_format", "timestamp_granularities[]", "stream"),
        *("stream_include_usage", "stream_continuous_usage_stats", "to_language", "use_beam_search", "n", "length_penalty"),
        *("include_stop_str_in_output", "temperature", "watermarking", "top_p", "top_k", "min_p", "seed", "frequency_penalty"),
        *("repetition_penalty", "presence_penalty", "max_completion_tokens", "user", "include[]", "chunking_strategy"),
    )
)
"""Of vLLM's forms, weighed one by one as those of gateway/api/fields.py, and of OpenAI's clients."""


class FormBody(msgspec.Struct, frozen=True, eq=False):
    """A form as the engine gets it, written anew: `pieces` one behind the other."""

    pieces: Sequence[bytes]
    type_line: bytes

    def parts(self, changes: Mapping[str, Any]) -> list[bytes]:
        """The request for the engine. A form has no place for any change."""
        if changes:
            raise ValueError("nothing can be put into a form")
        return [*self.pieces]


class Part(NamedTuple):
    """A field of a form, a file if it has a `filename`."""

    name: str
    value: bytes
    filename: str | None = None


def check_tenant(tenant: TenantContext, path: str) -> None:
    """Raises NotForTenants where a salt would be needed: vLLM's forms have no field for one."""
    if tenant.salt:
        raise NotForTenants(path)


async def read_form(raw: bytes | bytearray, headers: Iterable[tuple[bytes, bytes]]) -> tuple[dict[str, Any], None, Any]:
    """The fields that the gateway looks at, and what makes the replica's body. Raises InvalidRequest, UnsupportedParameter."""
    kind, options = parse_options_header(dict(headers).get(b"content-type", b""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest("Send a form: 'Content-Type: multipart/form-data'.", code="invalid_content_type")
    parts = await asyncio.to_thread(_parts, bytes(raw), boundary)
    for part in parts:
        if part.name in FORBIDDEN_FIELDS:
            raise UnsupportedParameter(part.name, FORBIDDEN_FIELDS[part.name])
        if part.name not in FIELDS:
            raise UnsupportedParameter(part.name, "it is not known here")
    if not any(part.name == "file" and part.filename is not None for part in parts):
        raise InvalidRequest("The form has no 'file'.", param="file", code="missing_file")
    texts = {part.name: part.value.decode("utf-8", "replace") for part in parts if part.filename is None}
    body: dict[str, Any] = {"model": texts.get("model") or None, "stream": texts.get("stream", "").lower() in ("true", "1")}
    sent = _written(parts)
    return body, None, lambda prompt: sent


def _parts(raw: bytes, boundary: bytes) -> list[Part]:
    found: list[Part] = []

    def field(given: Field) -> None:
        _take(found, Part(_text(given.field_name), given.value or b""))

    def file(given: File) -> None:
        given.file_object.seek(0)
        _take(found, Part(_text(given.field_name), given.file_object.read(), _text(given.file_name)))
        given.close()

    config: dict[str, Any] = {"MAX_MEMORY_FILE_SIZE": len(raw) + 1, "UPLOAD_ERROR_ON_BAD_CTE": True}
    try:
        parser = FormParser("multipart/form-data", field, file, boundary=boundary, config=config)
        parser.write(raw)
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequest(f"The form cannot be read: {error}.", code="invalid_form") from None
    return found


def _text(name: bytes | None) -> str:
    return (name or b"").decode("utf-8", "replace")


def _take(found: list[Part], part: Part) -> None:
    if len(found) >= PARTS_MAX:
        raise InvalidRequest(f"The form has more than {PARTS_MAX} fields.", code="invalid_form")
    if part.filename is None and len(part.value) > SMALL_BYTES_MAX:
        raise InvalidRequest(f"'{part.name}' is longer than {SMALL_BYTES_MAX} bytes.", param=part.name, code="invalid_form")
    found.append(part)


def _written(parts: Sequence[Part]) -> FormBody:
    boundary = os.urandom(16).hex()
    pieces: list[bytes] = []
    for part in parts:
        named = f'form-data; name="{part.name}"'
        if part.filename is not None:
            named += f'; filename="{_quoted(part.filename)}"'
        head = f"--{boundary}\r\ncontent-disposition: {named}\r\n"
        if part.filename is not None:
            head += "content-type: application/octet-stream\r\n"
        pieces += [head.encode() + b"\r\n", part.value, b"\r\n"]
    pieces.append(f"--{boundary}--\r\n".encode())
    return FormBody(pieces, f"content-type: multipart/form-data; boundary={boundary}\r\n".encode())


def _quoted(name: str) -> str:
    return name.replace("\\", "_").replace('"', "_").replace("\r", "_").replace("\n", "_")
