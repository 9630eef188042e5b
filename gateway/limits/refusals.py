"""What the holder of a key is told when it may not go on, in OpenAI's words."""

from __future__ import annotations

from math import ceil

from gateway.errors import INVALID, ApiError
from gateway.limits.account import Limit, Shortage

_WORDS = {
    Limit.REQUESTS_PER_MINUTE: "requests per min (RPM)",
    Limit.REQUESTS_IN_FLIGHT: "concurrent requests",
    Limit.TOKENS_PER_MINUTE: "tokens per min (TPM)",
    Limit.TOKENS_IN_FLIGHT: "tokens in flight",
    Limit.TOKENS_PER_DAY: "tokens per day",
    Limit.TOKENS_PER_MONTH: "tokens per month",
}
_OF_REQUESTS = frozenset({Limit.REQUESTS_PER_MINUTE, Limit.REQUESTS_IN_FLIGHT})
_NO_RETRY = {"x-should-retry": "false"}  # which OpenAI's clients heed


class LimitReached(ApiError):
    """A limit of the API key is reached: the same request may be served after `retry-after`, or has to be made smaller."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, key: str, short: Shortage, assumed: int | None = None) -> None:
        figures = f"Limit {short.allowed}, Used {short.used}, Requested {short.asked}"
        where = f"for API key '{key}' on {_WORDS[short.limit]}: {figures}"
        kind = "requests" if short.limit in _OF_REQUESTS else "tokens"
        if short.seconds is None:
            message = f"Request too large {where}. {_assumed(assumed)}Send a shorter prompt, or a smaller 'max_tokens' or 'n'."
            super().__init__(message, type=kind, headers=_NO_RETRY)
            return
        seconds = max(1, ceil(short.seconds))
        message = f"Rate limit reached {where}. Please try again in {seconds}s."
        super().__init__(message, type=kind, headers={"retry-after": str(seconds)})


class QuotaUsedUp(ApiError):
    """The budget of the API key is used up, or what is left of it is less than the request may come to."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"

    def __init__(self, key: str, short: Shortage, assumed: int | None = None) -> None:
        figures = f"Limit {short.allowed}, Used {short.used}, Requested {short.asked}"
        headers = dict(_NO_RETRY)
        if short.seconds is not None:
            headers["retry-after"] = str(max(1, ceil(short.seconds)))
        if short.asked > short.allowed:
            how = "Send a shorter prompt, or a smaller 'max_tokens' or 'n'."
            message = f"Request too large for API key '{key}' on {_WORDS[short.limit]}: {figures}. {_assumed(assumed)}{how}"
            super().__init__(message, headers=_NO_RETRY)
            return
        anew = "at 00:00 UTC" if short.limit is Limit.TOKENS_PER_DAY else "with the next month, in UTC"
        message = (
            f"API key '{key}' exceeded its quota on {_WORDS[short.limit]}: {figures}. {_assumed(assumed)}It begins anew {anew}."
        )
        super().__init__(message, headers=headers)


class NoSuchModel(ApiError):
    """The API key may not use that model, which need not exist."""

    status = 404
    type = INVALID
    code = "model_not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"The model '{name}' does not exist or you do not have access to it.", param="model")


def refusal(key: str, short: Shortage, assumed: int | None = None) -> ApiError:
    """The error of a shortage; `assumed` is the `max_tokens` reserved for a request that names none."""
    return QuotaUsedUp(key, short, assumed) if short.spent else LimitReached(key, short, assumed)


def _assumed(tokens: int | None) -> str:
    return (
        "" if tokens is None else f"It names no 'max_tokens', so {tokens} were reserved for each answer: naming fewer helps. "
    )
