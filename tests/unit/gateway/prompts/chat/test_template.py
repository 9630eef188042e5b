"""Chat rendering. The expected texts were taken from vLLM 0.32 with transformers 5.19, given the same template and body."""

import copy
from typing import Any

import pytest

from gateway.prompts.chat.content_format import detect_content_format
from gateway.prompts.chat.template import ChatNotRendered, ChatTemplate, template_environment

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
DUMP = (
    "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{% endfor %}{{ tools | tojson }}{{ documents | tojson }}"
    "{{ add_generation_prompt }}|{{ reasoning_effort }}|{{ enable_thinking }}|{{ extra }}"
)
PARTS = "{% for m in messages %}{{ m.role }}:{% for p in m['content'] %}[{{ p['type'] }} {{ p.text }}]{% endfor %}{% endfor %}"
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are SmolLM<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCKS = """{% for m in messages %}
  {% if m.role == 'user' %}
U {{ m.content }}
  {% else %}
{% generation %}A {{ m.content }}{% endgeneration %}

  {%- endif %}
{% if loop.index == 2 %}{% break %}{% endif %}
{% endfor %}
{{ "<b>'é&" | tojson }}{{ {"k": 1} | tojson(indent=2) }}
"""
HI = {"role": "user", "content": "hi"}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": "ü"}'}, "id": "c1"}


def render(template: str, messages: list[Any], **body: Any) -> str:
    return ChatTemplate({"default": template}, SPECIAL).render({"model": "m", "messages": messages, **body})


def test_a_conversation_with_unicode_is_rendered_with_a_generation_prompt() -> None:
    messages = [HI, {"role": "assistant", "content": "Grüezi"}, {"role": "user", "content": "日本 👩‍👩‍👧"}]
    assert render(CHATML, messages) == (
        "<|im_start|>system\nYou are SmolLM<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nGrüezi<|im_end|>\n"
        "<|im_start|>user\n日本 👩‍👩‍👧<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_system_prompt_takes_the_place_of_the_default_one() -> None:
    messages = [{"role": "system", "content": "s"}, HI]
    assert render(CHATML, messages, add_generation_prompt=False) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    )


def test_a_final_message_to_continue_is_left_open() -> None:
    messages = [HI, {"role": "assistant", "content": "one, two  "}]
    text = render(CHATML, messages, continue_final_message=True, add_generation_prompt=False)
    assert text.endswith("<|im_start|>assistant\none, two  ")


def test_of_a_final_message_in_parts_the_last_text_is_left_open() -> None:
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "go on"}]
    messages = [HI, {"role": "assistant", "content": parts}]
    text = render(PARTS, messages, continue_final_message=True, add_generation_prompt=False)
    assert text == "user:[text hi]assistant:[text x][text go on"


def test_whitespace_around_blocks_and_the_extra_tags_are_taken_as_transformers_does() -> None:
    text = render(BLOCKS, [HI, {"role": "assistant", "content": "yo"}, HI])
    assert text == 'U hi\nA yo"<b>\'é&"{\n  "k": 1\n}'


def test_only_known_fields_of_a_message_reach_the_template() -> None:
    text = render(DUMP, [{"content": "hi", "role": "user", "name": "bob", "foo": 1}])
    assert text == '<s>{"role": "user", "content": "hi", "name": "bob"}nullnullTrue|||'


def test_tool_calls_are_reordered_and_their_arguments_parsed() -> None:
    result = {"role": "tool", "tool_call_id": "c1", "name": "f", "content": [{"type": "text", "text": t} for t in "ab"]}
    assert render(DUMP, [{"role": "assistant", "content": None, "tool_calls": [CALL]}, result]) == (
        '<s>{"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "function": {"arguments": {"b": 1, "a": "ü"}, '
        '"name": "f"}, "type": "function"}]}{"role": "tool", "content": "a\\nb", "tool_call_id": "c1", "name": "f"}'
        "nullnullTrue|||"
    )


@pytest.mark.parametrize("arguments", ["", "oops", "[1]", "null"])
def test_arguments_that_are_no_object_become_an_empty_one(arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    assert '"function": {"arguments": {}, "name": "f"}' in render(
        DUMP, [{"role": "assistant", "content": "x", "tool_calls": [call]}]
    )


def test_empty_tool_calls_are_dropped() -> None:
    text = render(DUMP, [{"role": "assistant", "content": "y", "tool_calls": []}])
    assert text.startswith('<s>{"role": "assistant", "content": "y"}null')


def test_reasoning_is_shown_under_both_names_and_effort_turns_thinking_on() -> None:
    text = render(DUMP, [{"role": "assistant", "content": "x", "reasoning_content": "why"}], reasoning_effort="low")
    assert text == (
        '<s>{"role": "assistant", "content": "x", "reasoning": "why", "reasoning_content": "why"}nullnullTrue|low|True|'
    )


def test_tools_are_written_in_vllms_order_with_what_is_missing() -> None:
    tools = [{"function": {"parameters": {"b": 1, "a": 2}, "name": "f", "strict": True}, "type": "function"}]
    assert render(DUMP, [HI], tools=tools, tool_choice="auto") == (
        '<s>{"role": "user", "content": "hi"}[{"type": "function", "function": {"name": "f", "description": null, '
        '"parameters": {"b": 1, "a": 2}, "strict": true}}]nullTrue|||'
    )


def test_template_words_of_the_client_count_except_for_ours_and_for_nulls() -> None:
    words = {"extra": "e", "bos_token": "B", "add_generation_prompt": False, "enable_thinking": None}
    text = render(DUMP, [HI], chat_template_kwargs=words, documents=[{"title": "t"}])
    assert text == 'B{"role": "user", "content": "hi"}null[{"title": "t"}]True|||e'


def test_the_engines_default_words_come_before_the_clients() -> None:
    template = ChatTemplate({"default": "{{ a }}{{ b }}"}, {}, {"a": 1, "b": 2})
    assert template.render({"messages": [HI], "chat_template_kwargs": {"b": 3}}) == "13"


def test_developer_messages_join_the_system_message_where_the_template_knows_no_developer() -> None:
    parts = [{"type": "text", "text": text} for text in ("a", "", "b")]
    messages = [HI, {"role": "developer", "content": "be brief", "tools": None}, {"role": "system", "content": parts}]
    text = render(DUMP, messages)
    assert text.startswith('<s>{"role": "system", "content": "be brief\\n\\na\\nb"}{"role": "user", "content": "hi"}null')
    assert render("{{ messages[0].role }}{# 'developer' #}", messages[1:]) == "developer"


def test_a_billing_line_is_dropped_from_system_messages_alone() -> None:
    line = "x-anthropic-billing-header: cch=1"
    messages = [{"role": "system", "content": f"{line}\nrest"}, {"role": "user", "content": f"{line}\nstays"}]
    assert render("{% for m in messages %}{{ m.content }};{% endfor %}", messages) == f"rest;{line}\nstays;"
    assert render(PARTS, [{"role": "system", "content": [{"type": "text", "text": line}]}, HI]) == ("system:user:[text hi]")


def test_a_template_that_loops_over_parts_gets_parts() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "", "c")]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": "plain"},
    ]
    assert render(PARTS, messages) == "user:[text a][text ][text c]assistant:[text no]user:[text plain]"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "string"),
        (PARTS, "openai"),
        ("{% for m in messages[1:] %}{% for p in m.content %}{% endfor %}{% endfor %}", "openai"),
        ("{% set ms = messages %}{% for m in ms %}{% for p in m.content|list %}{% endfor %}{% endfor %}", "openai"),
        ("{% for m in messages %}{% set content = m.content %}{% for p in content %}{% endfor %}{% endfor %}", "openai"),
        (
            "{% macro show(c) %}{% for p in c %}{{ p }}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
            "openai",
        ),
        (
            "{% macro show(c) %}{% for p in c %}{{ p }}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ show(m.tools) }}{% endfor %}",
            "string",
        ),
        ("{% for a, b in messages %}{% endfor %}", "string"),
        ("{% for m in messages %", "string"),
    ],
)
def test_the_content_format_is_read_off_the_template(template: str, expected: str) -> None:
    assert detect_content_format(template_environment(), template) == expected


def test_the_engines_own_choice_of_content_format_wins() -> None:
    template = ChatTemplate({"default": "{{ messages[0].content | tojson }}"}, {}, content_format="openai")
    assert template.render({"messages": [HI]}) == '[{"type": "text", "text": "hi"}]'


def test_a_request_with_tools_takes_the_template_for_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools[0].function.name }}"}, {})
    assert template.takes_tools
    assert template.render({"messages": [HI]}) == "plain"
    assert template.render({"messages": [HI], "tools": [{"type": "function", "function": {"name": "f"}}]}) == "f"


def test_the_requests_body_stays_as_it_is() -> None:
    body = {"messages": [HI, {"role": "assistant", "content": "x", "tool_calls": [CALL]}], "tools": [dict(CALL)]}
    before = copy.deepcopy(body)
    ChatTemplate({"default": DUMP}, SPECIAL).render(body)
    assert body == before


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "uuid": "u"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
        {"messages": [{"role": "user", "content": ["a text without a type"]}]},
        {"messages": [HI], "add_generation_prompt": "false"},
        {"messages": [HI], "continue_final_message": None},
        {"messages": [HI], "tools": [{"function": {"name": "f", "strict": "yes"}}]},
        {"messages": [HI], "chat_template": "mine"},
        {"messages": [HI], "chat_template_kwargs": {"chat_template": "mine"}},
        {"messages": [HI], "chat_template_kwargs": {"tokenize": True}},
        {"messages": [HI], "chat_template_kwargs": [1]},
        {"messages": [HI], "truncate_prompt_tokens": 5},
        {"messages": [HI], "tools": []},
        {"messages": [HI], "tools": [{"type": "function"}]},
        {"messages": []},
        {"messages": ["hi"]},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"type": "custom"}]}]},
        {"messages": [HI], "continue_final_message": True},
    ],
)
def test_what_is_the_engines_business_is_not_rendered(body: dict[str, Any]) -> None:
    with pytest.raises(ChatNotRendered):
        ChatTemplate({"default": CHATML}, SPECIAL).render(body)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_a_template_that_refuses_fails_or_reaches_out_gives_no_text(template: str) -> None:
    with pytest.raises(ChatNotRendered):
        render(template, [HI])


def test_a_template_that_does_not_compile_is_said_to_be_so() -> None:
    with pytest.raises(ChatNotRendered, match="does not compile"):
        ChatTemplate({"default": "{% for %}"}, {})
    with pytest.raises(ChatNotRendered, match="no chat template"):
        ChatTemplate({}, {})
