"""Whether the gateway's token ids are the engine's: shown once per start on a few prompts, not assumed.

A router whose ids differ from its engines' has a hit rate of zero and no way to see why. So the same canaries are tokenised
here and by an engine's own POST /tokenize. Completions are sent as ids only while every canary agrees.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import httpx

from gateway.prompts.tokenizer.service import NoTokenIds, TokenService

_logger = logging.getLogger(__name__)

Ids = Sequence[int] | None
"""Token ids, None for a canary that is refused."""


class Parity(StrEnum):
    """What the comparison came to."""

    UNKNOWN = "unknown"  # not compared yet
    EXACT = "exact"  # every canary agrees
    DEGRADED = "degraded"  # some differ: ids serve as a hint, text goes as text
    OFF = "off"  # none agrees, or there is nothing to compare


@dataclass(frozen=True, slots=True)
class KindVerdict:
    """The verdict on completions or on chats. `differences` names the canaries that differ and where."""

    parity: Parity = Parity.UNKNOWN
    compared: int = 0
    differences: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ParityVerdict:
    """The outcome of one check. `context_tokens` is the engine's longest prompt and answer together, None if unknown."""

    completions: KindVerdict = field(default_factory=KindVerdict)
    chat: KindVerdict = field(default_factory=KindVerdict)
    replica: str = ""
    context_tokens: int | None = None

    @property
    def differences(self) -> int:
        """How many canaries differed."""
        return len(self.completions.differences) + len(self.chat.differences)


@dataclass(slots=True)
class ParityCounts:
    """Comparisons since the start: all, those not answered, those with a new verdict, and canaries that differed."""

    checks: int = 0
    failures: int = 0
    changes: int = 0
    differences: int = 0


class ParityCheckFailed(Exception):
    """The engine could not be asked: ask another, or later."""


COMPLETIONS: Mapping[str, str] = {
    "sentence": "The capital of France is",
    "leading space": "  two leading spaces, and a tab\there",
    "lines": "first line\nsecond line\r\n\r\n\n    indented\n",
    "accents": "Grüße aus Zürich — “naïve” façade, ﬁn. Å vs. A\u030a",
    "scripts": "日本語のテキスト 한국어 русский العربية हिन्दी ไทย",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇭 ✅",
    "digits": "3.14159 1234567890 0x1F 1e-9 ½ ²",
    "code": "def f(x):\n    return {k: v for k, v in x.items() if v != '</s>'}  # <|im_end|> <s>",
    "markers": "<|im_start|>user <|endoftext|> [INST] </s> <bos> <unk> <pad>",
    "odd": "a\u200bb\u00a0c\ufeffd \x7f e",
}

_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather of a place: “now”.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
_SECOND_CALL = {"id": "call_000000002", "type": "function", "function": {"name": "weather", "arguments": '{"place":"Genève"}'}}
_CALL = {"id": "call_000000001", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Zürich"}'}}

CHATS: Mapping[str, Mapping[str, Any]] = {
    "one turn": {"messages": [{"role": "user", "content": "What is the capital of France?"}]},
    "system prompt": {
        "messages": [
            {"role": "system", "content": "  You answer in one word.\n"},
            {"role": "user", "content": "Hauptstadt der Schweiz? 🇨🇭"},
        ]
    },
    "several turns": {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Grüezi! 日本語も話せます。"},
            {"role": "user", "content": "line one\n\nline two  "},
        ]
    },
    "content parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]}]
    },
    "long conversation": {
        "messages": [
            {"role": "system", "content": "Be brief. Réponds en français s'il le faut. 🦜"},
            {"role": "user", "content": "一二三 — what comes next?"},
            {"role": "assistant", "content": "四, 五 … and so on."},
            {"role": "user", "content": ""},
            {"role": "assistant", "content": "  \n\n(nothing was said)\n"},
            {"role": "user", "content": "<|im_end|> is not the end 🇨🇭\t."},
        ]
    },
    "no generation prompt": {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": False},
    "open answer": {
        "messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two,"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
}

TOOL_CHATS: Mapping[str, Mapping[str, Any]] = {
    "tools": {"messages": [{"role": "user", "content": "How is the weather in Zürich?"}], "tools": [_TOOL]},
    "tool result": {
        "messages": [
            {"role": "user", "content": "How is the weather in Zürich?"},
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "call_000000001", "name": "weather", "content": '{"sky": "clear"}'},
        ],
        "tools": [_TOOL],
    },
    "tools in several turns": {
        "messages": [
            {"role": "system", "content": "You may look at the sky — or not."},
            {"role": "user", "content": "天気は Zürich *and* Genève"},
            {"role": "assistant", "content": "I look twice.", "tool_calls": [_CALL, _SECOND_CALL]},
            {"role": "tool", "tool_call_id": "call_000000001", "name": "weather", "content": '{"sky": "☀️"}'},
            {"role": "tool", "tool_call_id": "call_000000002", "name": "weather", "content": "brouillard"},
            {"role": "assistant", "content": "☀️ in Zürich, fog in Genève."},
            {"role": "user", "content": "Thanks!"},
        ],
        "tools": [_TOOL],
    },
}


def compare(ours: Mapping[str, Ids], theirs: Mapping[str, Ids]) -> KindVerdict:
    """Compare ids by canary. A canary that both refuse says nothing."""
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
    chats = {**CHATS, **(TOOL_CHATS if tokens.chat_takes_tools else {})}
    engine = _Engine(socket, model, seconds_max)
    async with engine.client:
        theirs = {name: await engine.tokenize({"prompt": text}) for name, text in COMPLETIONS.items()}
        their_chats = {name: await engine.tokenize(chat) for name, chat in chats.items()}
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
    """An engine's /tokenize. `context_tokens` is what its last answer said of the model."""

    def __init__(self, socket: str, model: str, seconds_max: float) -> None:
        transport = httpx.AsyncHTTPTransport(uds=socket)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=seconds_max)
        self.context_tokens: int | None = None
        self._model = model

    async def tokenize(self, request: Mapping[str, Any]) -> Ids:
        """Return the engine's ids, None if it refuses the request. Raises ParityCheckFailed."""
        try:
            answer = await self.client.post("/tokenize", json={"model": self._model, **request})
            if answer.status_code not in (200, 404, 502, 503, 504):
                return None
            answer.raise_for_status()
            content = answer.json()
            self.context_tokens = content.get("max_model_len")
            return [int(token) for token in content["tokens"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ParityCheckFailed(f"/tokenize: {type(error).__name__}: {error}") from error
