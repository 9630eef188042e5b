"""A stand-in for vLLM's engine and detokenizer: a script of bytes is its model, so that a token often ends within a character.

Text is decoded by the library that vLLM uses, and stop strings are kept back and cut off as in vllm/v1/engine/detokenizer.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
END = len(_BYTES)
"""The id of the token that ends an answer."""


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={byte: place for place, byte in enumerate(_BYTES)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return tokenizer


TOKENIZER = make_tokenizer()


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text).ids)


def ends_whole(ids: list[int]) -> bool:
    """As TokenService.ends_whole."""
    shown = TOKENIZER.decode([ids[-1]], skip_special_tokens=True)
    return bool(shown) and not TOKENIZER.decode(ids[-8:], skip_special_tokens=False).endswith("\ufffd")


@dataclass
class Request:
    prompt: list[int]
    max_tokens: int
    min_tokens: int = 0
    stop: Sequence[str] = ()
    include_stop: bool = False
    usage: bool = True
    chat: bool = False


@dataclass
class Output:
    """One step, or several that were sent together."""

    text: str
    ids: list[int]
    finish: str | None = None
    stop: str | None = None


class Engine:
    """Answers any prompt that begins with `prompt` by the rest of `script`, ids of tokens."""

    def __init__(self, prompt: Sequence[int], script: Sequence[int], created: int) -> None:
        self._prompt, self._script, self._created = list(prompt), list(script), created

    def events(self, request: Request, together: Sequence[int] = ()) -> list[bytes]:
        """The events of the answer's stream; `together` says how many steps share each event, the rest have one each."""
        outputs = _merged(list(self._outputs(request)), together)
        found = [self._role(request)] if request.chat else []
        found += [self._event(request, output, first=not place) for place, output in enumerate(outputs)]
        if request.usage:
            done = sum(len(output.ids) for output in outputs)
            count = len(request.prompt)
            usage: dict[str, Any] = {"prompt_tokens": count, "total_tokens": count + done, "completion_tokens": done}
            usage["prompt_tokens_details"] = {"cached_tokens": count - 1}
            found.append(_data({**self._frame(request), "choices": [], "usage": usage}))
        return [*found, b"data: [DONE]\n\n"]

    def _outputs(self, request: Request) -> Iterator[Output]:
        begun = len(request.prompt) - len(self._prompt)
        assert request.prompt == self._prompt + self._script[:begun]
        stream = decoders.DecodeStream(ids=request.prompt, skip_special_tokens=True)
        lookback = max(map(len, request.stop), default=1) - 1
        held = 0 if request.include_stop else lookback
        text, sent = "", 0
        for count, token in enumerate(self._script[begun:], 1):
            finish = stopped = None
            before = len(text)
            if token == END and count > request.min_tokens:
                finish = "stop"
            else:
                text += stream.step(TOKENIZER, token) or ""
            if finish is None and count > request.min_tokens and (hit := _stop_in(text, len(text) - before, request)):
                stopped, text = hit
                finish = "stop"
            if finish is None and count == request.max_tokens:
                finish = "length"
            until = len(text) - (0 if finish else held)
            yield Output(text[sent:until] if until > sent else "", [token], finish, stopped)
            sent = max(sent, until)
            if finish:
                return

    def _event(self, request: Request, output: Output, *, first: bool) -> bytes:
        choice: dict[str, Any] = {"index": 0}
        choice |= {"delta": {"content": output.text}} if request.chat else {"text": output.text}
        choice |= {"logprobs": None, "finish_reason": output.finish}
        if output.finish or not request.chat:
            choice["stop_reason"] = output.stop
        if not request.chat:
            choice["prompt_token_ids"] = request.prompt if first else None
        return _data({**self._frame(request), "choices": [{**choice, "token_ids": output.ids}]})

    def _role(self, request: Request) -> bytes:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return _data({**self._frame(request), "choices": [choice], "prompt_token_ids": request.prompt})

    def _frame(self, request: Request) -> dict[str, Any]:
        kind = "chat.completion.chunk" if request.chat else "text_completion"
        return {"id": "one-id", "object": kind, "created": self._created, "model": "m"}


def _stop_in(text: str, new: int, request: Request) -> tuple[str, str] | None:
    """The stop string that ended among the `new` characters, and the text that is left."""
    found: list[tuple[int, str, int]] = []
    for stop in request.stop if new else ():
        at = text.find(stop, max(0, len(text) + 1 - new - len(stop)))
        if at >= 0:
            found.append((at + len(stop), stop, at))
    if not found:
        return None
    end, stop, at = min(found, key=lambda each: each[0])
    return stop, text[:end] if request.include_stop else text[:at]


def _merged(outputs: Sequence[Output], together: Sequence[int]) -> list[Output]:
    found: list[Output] = []
    sizes = iter(together)
    at = 0
    while at < len(outputs):
        size = next(sizes, 1)
        group = outputs[at : at + size]
        at += size
        ids = [each for output in group for each in output.ids]
        found.append(Output("".join(output.text for output in group), ids, group[-1].finish, group[-1].stop))
    return found


def _data(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
