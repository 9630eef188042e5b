"""What a client gets whose request is none, or one too many: an answer before there is any application."""

from __future__ import annotations

from gateway.errors import ApiError, InvalidRequest


class HeadTooLarge(InvalidRequest):
    """The request line and headers are larger than the settings allow."""

    code = "head_too_large"

    def __init__(self, bytes_max: int) -> None:
        super().__init__(f"The request's head is larger than the {bytes_max} bytes that are taken.", status=431)


def rejection(error: ApiError, request_id: str) -> bytes:
    """The whole answer, after which the connection has to be closed."""
    body = error.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    headers["x-request-id"] = request_id
    lines = [f"HTTP/1.1 {error.status} Rejected"]
    lines += [f"{name}: {value}" for name, value in (headers | error.headers).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
