"""Whether the gateway's token ids are the engine's: shown on a few prompts at each start, not assumed.

A router whose ids differ from its engines' has a hit rate of zero and no way to see why. So the same canaries are tokenised
here and by an engine's own POST /tokenize, and a few chats, whose fields /tokenize does not know, by a chat of one token.
Completions are sent as ids only while every canary agrees.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

import httpx
from pydantic import Field

from gateway.prompts.canaries import ANSWERED_CHATS, ANSWERED_TOOL_CHATS, CHATS, COMPLETIONS, TOOL_CHATS
from gateway.prompts.tokenizer.service import NoTokenIds, TokenService

_logger = logging.getLogger(__name__)

CANARY_SALT = "peerkv canaries"
"""Keeps what is computed for canaries separate from all clients' prompts."""
_UNAVAILABLE = frozenset((502, 503, 504))
_NO_TOKENIZER = _UNAVAILABLE | {404}

Ids = Sequence[int] | None
"""Token ids, or None for a canary that is refused."""


class Parity(StrEnum):
    """The result of the comparison."""

    UNKNOWN = "unknown"  # not compared yet
    EXACT = "exact"  # every canary agrees
    DEGRADED = "degraded"  # some differ: ids serve as a hint, text goes as text
    OFF = "off"  # none agrees, or there is nothing to compare


@dataclass(frozen=True, slots=True)
class KindVerdict:
    """Whether our token ids are the engine's, for one kind of request."""

    parity: Parity = Parity.UNKNOWN
    compared: int = 0
    differences: Annotated[tuple[str, ...], Field(description="canaries that differ, and where")] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ParityVerdict:
    """The outcome of one check. `context_tokens` is the engine's limit on prompt plus answer, None if unknown."""

    completions: KindVerdict = field(default_factory=KindVerdict)
    chat: KindVerdict = field(default_factory=KindVerdict)
    replica: str = ""
    context_tokens: int | None = None

    @property
    def differences(self) -> int:
        """The number of canaries that differed."""
        return len(self.completions.differences) + len(self.chat.differences)


@dataclass(slots=True)
class ParityCounts:
    """Comparisons since the gateway's start."""

    checks: Annotated[int, Field(description="comparisons begun")] = 0
    failures: Annotated[int, Field(description="of these, comparisons without an answer from the engine")] = 0
    changes: Annotated[int, Field(description="comparisons whose verdict differed from the previous one")] = 0
    differences_found: Annotated[int, Field(description="canaries whose ids differed, over all comparisons")] = 0


class ParityCheckFailed(Exception):
    """The engine could not be asked: try another one, or later."""


def compare(ours: Mapping[str, Ids], theirs: Mapping[str, Ids]) -> KindVerdict:
    """Compare ids canary by canary. One that both refuse says nothing."""
    asked = [name for name in ours if ours[name] is not None or theirs.get(name) is not None]
    if not asked:
        return KindVerdict(Parity.OFF, reason="there is nothing to compare")
    differences = tuple(f"{name}: {where}" for name in asked if (where := _first_difference(ours[name], theirs.get(name))))
    if not differences:
        return KindVerdict(Parity.EXACT, len(asked))
    parity = Parity.OFF if len(differences) == len(asked) else Parity.DEGRADED
    return KindVerdict(parity, len(asked), differences, f"{len(differences)} of {len(asked)} canaries differ")


def _first_difference(ours: Ids, theirs: Ids) -> str:
    if ours is None:
        return "not tokenised here"
    if theirs is None:
        return "refused by the engine"
    for place, (mine, yours) in enumerate(zip(ours, theirs, strict=False)):
        if mine != yours:
            return f"token {place} is {mine} here, {yours} in the engine"
    return "" if len(ours) == len(theirs) else f"{len(ours)} tokens here, {len(theirs)} in the engine"


async def check_parity(tokens: TokenService, replica: str, socket: str, model: str, seconds_max: float = 30.0) -> ParityVerdict:
    """Compare with the engine behind the unix socket at path `socket`, which serves `model`.

    Each answer may take `seconds_max`. Raises ParityCheckFailed if the engine does not answer.
    """
    state = await asyncio.to_thread(tokens.load)
    chats, answered = {**CHATS}, {**ANSWERED_CHATS}
    if tokens.chat_takes_tools:
        chats |= TOOL_CHATS
        answered |= ANSWERED_TOOL_CHATS
    engine = _Engine(socket, model, seconds_max)
    async with engine.client:
        theirs = {name: await engine.tokenize({"prompt": text}) for name, text in COMPLETIONS.items()}
        their_chats = {name: await engine.tokenize(chat) for name, chat in chats.items()}
        if state.chat:
            for name, asked in answered.items():
                # The engine would also refuse it from a client: that says nothing about ids.
                if (ids := await engine.answer(asked)) is not None:
                    chats[name], their_chats[name] = asked, ids
    completions = compare({name: _ours(tokens, text) for name, text in COMPLETIONS.items()}, theirs)
    chat = compare({name: _ours_of_chat(tokens, body) for name, body in chats.items()}, their_chats)
    if not state.loaded:
        completions = KindVerdict(Parity.OFF, reason=state.reason)
    if not state.chat:
        chat = KindVerdict(Parity.OFF, reason=state.chat_reason)
    verdict = ParityVerdict(completions, chat, replica, engine.context_tokens)
    _log(verdict)
    return verdict


def _ours(tokens: TokenService, text: str) -> Ids:
    try:
        return tokens.encode(text)
    except NoTokenIds:
        return None


def _ours_of_chat(tokens: TokenService, body: Mapping[str, Any]) -> Ids:
    try:
        return tokens.encode_chat(body)
    except NoTokenIds:
        return None


def _log(verdict: ParityVerdict) -> None:
    for kind, found in (("completions", verdict.completions), ("chats", verdict.chat)):
        if found.parity is Parity.EXACT:
            _logger.info("token ids of %s are the engine's on %d canaries", kind, found.compared)
        else:
            _logger.warning("token ids of %s: %s. %s", kind, found.reason, "; ".join(found.differences))


class _Engine:
    """An engine's ids. `context_tokens` is from its last answer."""

    def __init__(self, socket: str, model: str, seconds_max: float) -> None:
        transport = httpx.AsyncHTTPTransport(uds=socket, verify=False)  # else certificates are loaded, for 50 ms
        self.client = httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=seconds_max)
        self.context_tokens: int | None = None
        self._model = model

    async def tokenize(self, request: Mapping[str, Any]) -> Ids:
        """Return the ids by /tokenize, None if the engine refuses the request. Raises ParityCheckFailed."""
        content = await self._ask("/tokenize", request, _NO_TOKENIZER)
        if content is None:
            return None
        self.context_tokens = content.get("max_model_len")
        return _ids_of(content, "tokens")

    async def answer(self, chat: Mapping[str, Any]) -> Ids:
        """Return the ids of the prompt that a chat is answered from, None for one that is refused. Raises ParityCheckFailed."""
        wanted = {"max_tokens": 1, "temperature": 0, "return_token_ids": True, "cache_salt": CANARY_SALT}
        content = await self._ask("/v1/chat/completions", {**chat, **wanted}, _UNAVAILABLE)
        # A vLLM that does not know return_token_ids does not take chats' ids either.
        return None if content is None or content.get("prompt_token_ids") is None else _ids_of(content, "prompt_token_ids")

    async def _ask(self, path: str, request: Mapping[str, Any], failures: Set[int]) -> dict[str, Any] | None:
        """Return the answer to a POST, None for an error status. Raises ParityCheckFailed, also for a status in `failures`."""
        try:
            answer = await self.client.post(path, json={"model": self._model, **request})
            if answer.status_code != 200 and answer.status_code not in failures:
                return None
            answer.raise_for_status()
            content: dict[str, Any] = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ParityCheckFailed(f"{path}: {type(error).__name__}: {error}") from error
        return content


def _ids_of(content: object, name: str) -> list[int]:
    try:
        return [int(token) for token in content[name]]  # type: ignore[index]
    except (ValueError, KeyError, TypeError) as error:
        raise ParityCheckFailed(f"no '{name}' in the engine's answer: {type(error).__name__}: {error}") from error
