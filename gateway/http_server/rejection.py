"""Answers to requests that are malformed or exceed a bound, before any application sees them."""

from __future__ import annotations

from gateway.errors import ApiError, InvalidRequest


class HeadTooLarge(InvalidRequest):
    """The request line and headers are larger than the settings allow."""

    code = "head_too_large"

    def __init__(self, bytes_max: int) -> None:
        super().__init__(f"The request's head is larger than the limit of {bytes_max} bytes.", status=431)


def rejection(error: ApiError, request_id: str) -> bytes:
    """The whole answer, after which the connection has to be closed."""
    body = error.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    headers["x-request-id"] = request_id
    lines = [f"HTTP/1.1 {error.status} Rejected"]
    lines += [f"{name}: {value}" for name, value in (headers | error.headers).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
