"""Why a request's head is refused although it parses (RFC 9112). Pure."""

from __future__ import annotations

from gateway.errors import ApiError, InvalidRequest
from gateway.http_server.request_cycle import RawHeaders

OF_CONNECTION = frozenset({b"connection", b"proxy-connection"})
"""Headers from which llhttp concludes whether another message follows."""

_ONCE = (b"authorization", b"x-api-key", b"content-type", b"x-peerkv-replica", b"x-peerkv-quality")

VERSIONS = frozenset({"1.0", "1.1"})
"""The versions of HTTP that are spoken here. llhttp also accepts 0.9 and 2.0."""


def head_defect(version: str, headers: RawHeaders) -> ApiError | None:
    """Why a request with this version and these headers, names in lower case, is refused; None if it is not.

    A proxy between the client and us may read such a head differently: another version's rules, another host, another key,
    another end of the body.
    """
    if version not in VERSIONS:
        return InvalidRequest("Send the request in HTTP/1.1.", status=505, code="invalid_http")
    names = [name for name, _ in headers]
    hosts = names.count(b"host")
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        return InvalidRequest(f"A request has one Host header; this one has {hosts}.", code="invalid_http")
    for name in _ONCE:
        if names.count(name) > 1:
            return InvalidRequest(f"The header '{name.decode()}' occurs twice.", code="invalid_http")
    if b"transfer-encoding" in names and not is_plainly_chunked(headers):
        return InvalidRequest("'chunked' is the only transfer coding there is here.", status=501, code="invalid_http")
    return None


def is_plainly_chunked(headers: RawHeaders) -> bool:
    """Whether a message has chunked as its only transfer coding: under any other one, its bytes are not its body."""
    return [value.lower() for name, value in headers if name == b"transfer-encoding"] == [b"chunked"]
