"""Fields of a chat's body: each was weighed, and what is not known goes as text."""

import pytest

from gateway.api.body import FORBIDDEN_FIELDS
from gateway.prompts.chat.request_fields import KNOWN, all_known, ids_suffice


def test_every_field_of_the_installed_vllms_chats_was_weighed() -> None:
    pytest.importorskip("vllm")
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest

    fields = ChatCompletionRequest.model_fields.keys()
    assert fields <= KNOWN | FORBIDDEN_FIELDS.keys()
    assert TokenizeChatRequest.model_fields.keys() - {"return_token_strs"} <= fields


def test_a_field_of_tomorrow_may_do_anything() -> None:
    assert all_known({"messages": [], "temperature": 1})
    assert not all_known({"messages": [], "a_field_of_tomorrow": 1})
    assert not ids_suffice({"messages": [], "a_field_of_tomorrow": 1})


@pytest.mark.parametrize("name", ["echo", "return_prompt_text"])
def test_what_is_answered_from_the_text_needs_the_text(name: str) -> None:
    assert ids_suffice({"messages": [], "n": 1})
    assert ids_suffice({"messages": [], name: False})
    assert not ids_suffice({"messages": [], name: True})
