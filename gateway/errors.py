"""Errors that the gateway answers with, in OpenAI's JSON form.

Leaf classes say what the caller can do. `ApiError` carries everything an answer needs, so any layer may raise one
and only the front door turns it into bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

INVALID = "invalid_request_error"
RETRY_AFTER_SECONDS = 1


class GatewayError(Exception):
    """Base of every error that the gateway itself raises."""


class SettingsError(GatewayError):
    """The settings are wrong; the message is one line that names the key and says what to do."""


class ApiError(GatewayError):
    """An error with an HTTP status and OpenAI's fields.

    `headers` are extra answer headers, names in lower case.
    """

    status = 500
    type = "internal_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = self.status if status is None else status
        self.type = self.type if type is None else type
        self.code = self.code if code is None else code
        self.param = param
        self.headers: dict[str, str] = dict(headers or {})

    def body(self) -> bytes:
        """Return the answer's JSON: `{"error": {"message", "type", "param", "code"}}`."""
        return error_body(self.message, type=self.type, code=self.code, param=self.param)


def error_body(message: str, *, type: str, code: str | None = None, param: str | None = None) -> bytes:
    """OpenAI's error JSON. Half a surrogate pair out of a client's text has no UTF-8: it is shown as "?"."""
    shown = message.encode(errors="replace").decode()
    return msgspec.json.encode({"error": {"message": shown, "type": type, "param": param, "code": code}})


class InvalidRequest(ApiError):
    """The request is malformed; the client has to change it."""

    status = 400
    type = INVALID


class InvalidJson(InvalidRequest):
    """The body is not a readable JSON object."""

    code = "invalid_json"


class UnsupportedParameter(InvalidRequest):
    """The body sets a field that a client may not set."""

    code = "unsupported_parameter"

    def __init__(self, name: str, why: str = "the gateway sets it itself") -> None:
        super().__init__(f"'{name}' is not accepted from a client: {why}. Remove the field.", param=name)


class PromptTooLong(InvalidRequest):
    """The prompt does not fit into the model's context window."""

    code = "context_length_exceeded"

    def __init__(self, prompt_tokens: int, context_tokens: int, *, param: str = "prompt") -> None:
        super().__init__(
            f"This model's maximum context length is {context_tokens} tokens, but the prompt alone has "
            f"{prompt_tokens}. Shorten the prompt.",
            param=param,
        )


class NotAuthenticated(ApiError):
    """No key, or one that belongs to nobody."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def __init__(self, message: str = "Incorrect API key. Send 'Authorization: Bearer <key>'.") -> None:
        super().__init__(message, headers={"www-authenticate": "Bearer"})


class Forbidden(ApiError):
    """The caller is known or anonymous, and may not do this."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class UnknownPath(ApiError):
    """There is no such endpoint."""

    status = 404
    type = INVALID
    code = "unknown_url"

    def __init__(self, method: str, path: str) -> None:
        page = ", and /ui for a page about it" if path == "/" else ""
        super().__init__(f"Unknown request URL: {method} {path}. See /openapi.json for what is served{page}.")


class UnknownModel(ApiError):
    """The named model is not served here."""

    status = 404
    type = INVALID
    code = "model_not_found"

    def __init__(self, name: str, served: Iterable[str]) -> None:
        listed = ", ".join(served) or "none yet"
        super().__init__(f"The model '{name}' does not exist. Served here: {listed}.", param="model")


class NotOfThisModel(ApiError):
    """The endpoint exists, but the engine does not offer it for this model."""

    status = 404
    type = INVALID
    code = "unsupported_endpoint"

    def __init__(self, path: str) -> None:
        super().__init__(f"The model served here does not support {path}. Embeddings, for example, need an embedding model.")


class MethodNotAllowed(ApiError):
    """The endpoint exists but takes other methods; `allowed` goes into the `allow` header."""

    status = 405
    type = INVALID
    code = "method_not_allowed"

    def __init__(self, method: str, path: str, allowed: Iterable[str]) -> None:
        names = ", ".join(allowed)
        super().__init__(f"{path} does not take {method}. Use {names}.", headers={"allow": names})


class BodyTooLarge(ApiError):
    """The request body is larger than the settings allow."""

    status = 413
    type = INVALID
    code = "body_too_large"

    def __init__(self, bytes_max: int) -> None:
        super().__init__(f"The request body is larger than the limit of {bytes_max} bytes.")


class TooManyRequests(ApiError):
    """The gateway is serving as many requests as it may; try again shortly."""

    status = 429
    type = "rate_limit_error"
    code = "too_many_requests"

    def __init__(self, requests_max: int) -> None:
        super().__init__(
            f"{requests_max} requests are already in flight. Try again shortly.",
            headers={"retry-after": str(RETRY_AFTER_SECONDS)},
        )


class Unavailable(ApiError):
    """Nobody can serve this now; the same request may work after `retry-after`."""

    status = 503
    type = "service_unavailable"
    code = "unavailable"

    def __init__(self, message: str, *, retry_after_seconds: int = RETRY_AFTER_SECONDS) -> None:
        super().__init__(message, headers={"retry-after": str(retry_after_seconds)})


class NoReplicaReady(Unavailable):
    """No replica can take the request now."""

    code = "no_replica_ready"

    def __init__(self, why: str = "", *, retry_after_seconds: int = 5) -> None:
        detail = f" ({why})" if why else ""
        super().__init__(f"No replica is ready{detail}. /ready says more.", retry_after_seconds=retry_after_seconds)


class ReplicaNotReady(Unavailable):
    """The replica that the request names is not ready."""

    code = "replica_not_ready"

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"Replica '{name}' {what}: it takes no requests now.", retry_after_seconds=5)


class UnknownReplica(InvalidRequest):
    """The request names a replica that does not exist."""

    code = "unknown_replica"

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"There is no replica '{name}'. There are: {', '.join(known) or 'none'}.")


class UnknownRequest(ApiError):
    """The ledger has nothing under that request id."""

    status = 404
    type = "invalid_request_error"
    code = "request_not_found"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"No request '{request_id}' is in the ledger: it was never received, or newer ones displaced it.")


class UnknownResponse(ApiError):
    """No replica can have the response that a request goes on from."""

    status = 404
    type = INVALID
    code = "previous_response_not_found"

    def __init__(self, response_id: str) -> None:
        super().__init__(
            f"Previous response '{response_id}' is not kept here: it was made with the API key of another tenant, or by a "
            "replica that is gone. Send the conversation so far as 'input'.",
            param="previous_response_id",
        )


class NotForTenants(ApiError):
    """The endpoint has no place for a salt, so tenants would share a cache."""

    status = 403
    type = "permission_error"
    code = "unsupported_endpoint"

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path} is served only where no tenants are configured: the engine could not keep their caches apart on it."
        )


class ReplicaLost(ApiError):
    """Replicas died while serving the request and all attempts are used up; the client may send it again."""

    status = 502
    type = "upstream_error"
    code = "replica_lost"

    def __init__(self, message: str = "The replica that served this request was lost. Send it again.") -> None:
        super().__init__(message, headers={"retry-after": str(RETRY_AFTER_SECONDS)})


class ReplicaTooSlow(ApiError):
    """The replica did not begin its answer within `response_head_seconds_max`."""

    status = 504
    type = "upstream_error"
    code = "replica_timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The replica did not begin to answer within {seconds:g} s.")


class DeadlinePassed(ApiError):
    """The answer did not begin within the time that the request's header x-request-timeout gives it."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The answer did not begin within {seconds:g} s, as the header 'x-request-timeout' wants it.")


class InternalError(ApiError):
    """A defect in the gateway. The message reveals no internals; the log has them under the request's id."""

    code = "internal_error"

    def __init__(self, request_id: str = "") -> None:
        where = f" The log has more under request id {request_id}." if request_id else ""
        super().__init__(f"The gateway failed on this request.{where}")
