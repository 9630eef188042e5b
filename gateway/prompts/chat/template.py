"""A chat request as the text that the engine makes of it: the model's own template, rendered as vLLM and transformers do.

The result serves steering, so it is worth nothing unless it is exact: whatever the engine would treat in a way that is not
followed here (media, a client's own template) raises ChatNotRendered, and the request is steered without token ids.
Followed: vllm/renderers/{chat_utils,hf,params}.py (0.32) and transformers/utils/chat_template_utils.py (5.x).
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.prompts.chat.content_format import ContentFormat, detect_content_format
from gateway.prompts.chat.conversation import ChatNotRendered, conversation, conversation_tools
from gateway.prompts.chat.request_fields import ENGINES, RENDERED

__all__ = ["ChatNotRendered", "ChatTemplate"]

CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
# Words that steer transformers' renderer itself rather than the template: not followed from a client.
_RENDERER_WORDS = frozenset(
    (
        *("chat_template", "conversation", "max_length", "messages", "model_config", "padding", "return_assistant_tokens_mask"),
        *("return_dict", "return_tensors", "tokenize", "tokenizer", "tokenizer_kwargs", "truncation"),
    )
)
_SWITCHES = ("add_generation_prompt", "continue_final_message")
_WORD_FIELDS = (RENDERED - {"messages", "add_special_tokens"}) | frozenset(ENGINES)
"""All of a body, beside its messages, that what a template is rendered with depends on."""


class _Generation(Extension):
    """`{% generation %}` marks an assistant's words for training; in a prompt its body is simply shown."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_show")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _show(self, caller: Any) -> Any:
        return caller()


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def template_environment() -> ImmutableSandboxedEnvironment:
    """Return the jinja2 environment that chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Compiled:
    """One template, compiled, with what has to be known about its source."""

    def __init__(self, environment: ImmutableSandboxedEnvironment, source: str, content_format: str) -> None:
        try:
            self.template = environment.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except jinja2.TemplateError as error:
            raise ChatNotRendered(f"the chat template does not compile: {error}") from error
        self.source = source
        self.knows_developer = '"developer"' in source or "'developer'" in source
        self.content_format: ContentFormat = (
            "openai"
            if content_format == "openai"
            else "string"
            if content_format == "string"
            else detect_content_format(environment, source)
        )


class ChatTemplate:
    """Renders chat requests for one model. Thread safe: it keeps nothing of a request.

    `templates` are sources by name, `special_tokens` named tokens (bos_token …) that a template may use, `defaults` the
    engine's --default-chat-template-kwargs, `exclude_tools` its --exclude-tools-when-tool-choice-none. Raises ChatNotRendered
    if there is no template or it does not compile.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str],
        defaults: Mapping[str, Any] | None = None,
        content_format: str = "auto",
        *,
        exclude_tools: bool = False,
    ) -> None:
        if "default" not in templates:
            raise ChatNotRendered("the model has no chat template")
        environment = template_environment()
        self._compiled = {name: _Compiled(environment, text, content_format) for name, text in templates.items()}
        self._special_tokens = dict(special_tokens)
        self._defaults = dict(defaults or {})
        self._exclude_tools = exclude_tools
        self._plain = self._ready_words({})

    @property
    def takes_tools(self) -> bool:
        """Whether a template of this model looks at the request's tools."""
        return any("tools" in compiled.variables for compiled in self._compiled.values())

    def render(self, body: Mapping[str, Any]) -> str:
        """Return the prompt's text for the body of a chat request, which is left as it is. Raises ChatNotRendered."""
        compiled, words = self._plain if _WORD_FIELDS.isdisjoint(body) else self._ready_words(body)
        messages = conversation(body.get("messages"), compiled.content_format, compiled.knows_developer)
        going_on = body.get("continue_final_message", False)
        return (_render_open if going_on else _render)(compiled, messages, words)

    def _ready_words(self, body: Mapping[str, Any]) -> tuple[_Compiled, Mapping[str, Any]]:
        """Return the template for a body, and what it is rendered with beside the messages. Raises ChatNotRendered."""
        words = self._words(body)
        tools = words.pop("tools", None)
        compiled = self._compiled["default"]
        if tools is not None and "tool_use" in self._compiled:
            compiled = self._compiled["tool_use"]
        words = {name: value for name, value in words.items() if name in compiled.variables}
        if body.get("continue_final_message", False) and words.get(
            "add_generation_prompt", body.get("add_generation_prompt", True)
        ):
            raise ChatNotRendered("continue_final_message with add_generation_prompt: the engine refuses it")
        always = {"documents": None, "add_generation_prompt": False}
        return compiled, always | self._special_tokens | words | {"tools": tools}

    def _words(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the template is rendered with, beside the messages: engine's defaults, client's words, ours."""
        for name in ENGINES:
            if body.get(name) is not None:
                raise ChatNotRendered(f"only the engine handles {name}")
        for name in _SWITCHES:
            if not isinstance(body.get(name, False), bool):
                raise ChatNotRendered(f"{name} is malformed, or the engine takes it for a boolean")
        given = body.get("chat_template_kwargs") or {}
        if not isinstance(given, Mapping) or _RENDERER_WORDS & given.keys():
            raise ChatNotRendered("only the engine handles chat_template_kwargs")
        effort = body.get("reasoning_effort")
        ours = {
            "add_generation_prompt": body.get("add_generation_prompt", True),
            "continue_final_message": body.get("continue_final_message", False),
            "documents": body.get("documents"),
            "reasoning_effort": effort,
        }
        if effort is not None and "enable_thinking" not in given:
            ours["enable_thinking"] = effort != "none"
        excluded = self._exclude_tools and body.get("tool_choice") == "none"
        tools = None if excluded else conversation_tools(body.get("tools"))
        return _merge(self._defaults | _merge({}, {"tools": tools}), given, ours)


def _merge(base: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `others` over `base`, as vLLM does: None and "auto" do not count."""
    merged = dict(base)
    for other in others:
        merged.update({name: value for name, value in other.items() if value is not None and value != "auto"})
    return merged


def _render(compiled: _Compiled, messages: Sequence[Mapping[str, Any]], words: Mapping[str, Any]) -> str:
    try:
        return compiled.template.render(words, messages=messages)
    except jinja2.TemplateError as error:
        raise ChatNotRendered(f"the chat template refuses the request: {error}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        # Whatever a template trips over in odd input, the engine trips over it as well and answers 400.
        raise ChatNotRendered(f"the chat template fails on the request: {type(error).__name__}") from error


def _render_open(compiled: _Compiled, messages: Sequence[dict[str, Any]], words: Mapping[str, Any]) -> str:
    """Render with the final message left open: a tag marks where it ends, and all from there on is cut off."""
    if not messages or "content" not in compiled.source:
        raise ChatNotRendered("there is no final message to continue")
    last = dict(messages[-1])
    content = last.get("content")
    if isinstance(content, str):
        final = content
        last["content"] = content + CONTINUE_TAG
    elif isinstance(content, list):
        parts = [dict(part) for part in content]
        texts = [part for part in parts if "text" in part]
        if not texts:
            raise ChatNotRendered("the final message has no text to continue")
        final = texts[-1]["text"]
        texts[-1]["text"] = final + CONTINUE_TAG
        last["content"] = parts
    else:
        raise ChatNotRendered("the final message has no content to continue")
    shown = _render(compiled, [*messages[:-1], last], words)
    place = shown.rfind(CONTINUE_TAG.strip())
    if place < 0 or final.strip() not in shown:
        raise ChatNotRendered("the template does not show the final message as it is")
    kept = shown[:place]
    return kept if shown.startswith(CONTINUE_TAG, place) else kept.rstrip()
