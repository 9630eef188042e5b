"""Which streams a gateway can go on with, by its settings, the engines' options and the model's files; tool calls in full."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gateway.continuation.tape import Tape
from gateway.prompts.tokenizer.answer_defaults import answer_tokens_default, parses_chats
from gateway.prompts.tokenizer.engine_options import source_from_arguments
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService
from gateway.relay.going_on import GoingOn
from gateway.serve.fleet_parts import _going_on
from gateway.settings import Settings
from tests.unit.gateway.prompts.tiny_model import make_llama, make_model

GREEDY = {"temperature": 0, "stream": True}


class Knowing:
    """A planner that knows each prompt."""

    def knows_prompt(self, plan: Any) -> bool:
        return True


def going_on(model: Path, *options: str, **values: Any) -> GoingOn[Any] | None:
    source = source_from_arguments(str(model), options)
    planner: Any = Knowing()
    return _going_on(Settings(**values), planner, TokenService(source), source, options)


def tape(found: GoingOn[Any] | None, endpoint: Any = "completions", **body: Any) -> Tape | None:
    assert found is not None
    plan: Any = None
    return found.tape(endpoint, GREEDY | body, None, plan)


def test_completions_and_chats_of_a_plain_model_go_on_behind_their_tokens(tmp_path: Path) -> None:
    make_llama(tmp_path)
    for endpoint in ("completions", "chat"):
        found = tape(going_on(tmp_path), endpoint)
        assert found is not None
        assert not found.terms.parsed


@pytest.mark.parametrize(
    "option", ["--reasoning-parser=deepseek_r1", "--tool-call-parser", "--tool_call_parser=hermes", "--rea"]
)
def test_chats_of_engines_with_a_parser_are_made_anew(tmp_path: Path, option: str) -> None:
    make_llama(tmp_path)
    found = going_on(tmp_path, option)
    chat, completion = tape(found, "chat"), tape(found)
    assert chat is not None
    assert completion is not None
    assert (chat.terms.parsed, completion.terms.parsed) == (True, False)


def test_chats_of_a_model_that_is_rendered_in_its_own_way_or_not_known_are_made_anew(tmp_path: Path) -> None:
    make_model(tmp_path)
    assert not parses_chats(TokenizerSource(str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    assert parses_chats(TokenizerSource(str(tmp_path)))
    assert parses_chats(TokenizerSource(str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    "option",
    [
        *("--generation-config", "--generation-config=vllm", "--generation_config=vllm", "--ge=vllm"),
        *('--override-generation-config={"top_p": 1}', "--override-generation-config.max_new_tokens=5", "--ov={}"),
        *("--logits-processors", "--logits_processors=a.module:Name", "--logi=a.module:Name"),
    ],
)
def test_options_that_may_bound_answers_anew_or_look_back_at_them_turn_it_off(tmp_path: Path, option: str) -> None:
    make_llama(tmp_path)
    assert going_on(tmp_path, option) is None


@pytest.mark.parametrize(
    "option", ["--gpu-memory-utilization=0.5", "--gdn-prefill-backend=x", "--logging-config=x", "--log-level=x"]
)
def test_other_options_leave_it_on(tmp_path: Path, option: str) -> None:
    make_llama(tmp_path)
    assert tape(going_on(tmp_path, option)) is not None


def test_the_setting_turns_it_off(tmp_path: Path) -> None:
    make_llama(tmp_path)
    assert going_on(tmp_path, continue_streams=False) is None


def test_a_chat_without_a_bound_has_that_of_the_models_files(tmp_path: Path) -> None:
    make_llama(tmp_path)
    source = TokenizerSource(str(tmp_path))
    assert answer_tokens_default(source) is None
    other = tmp_path / "other"
    make_llama(other)
    (other / "generation_config.json").write_text(json.dumps({"max_new_tokens": 77}))
    found = tape(going_on(other), "chat")
    assert found is not None
    assert found.terms.max_tokens == 77
    assert answer_tokens_default(TokenizerSource(str(tmp_path / "nowhere"))) is False


def test_the_models_files_are_looked_for_until_they_are_there_and_not_for_each_request(tmp_path: Path) -> None:
    model = tmp_path / "later"
    source = TokenizerSource(str(model))
    assert answer_tokens_default(source) is False
    make_llama(model)
    (model / "generation_config.json").write_text(json.dumps({"max_new_tokens": 77}))
    assert answer_tokens_default(source) == 77
    shutil.rmtree(model)
    assert answer_tokens_default(source) == 77


def test_whether_text_ends_with_a_whole_character_is_told_by_the_tokenizer(tmp_path: Path) -> None:
    service = TokenService(TokenizerSource(str(make_model(tmp_path))))
    assert not service.ends_whole([5])  # not loaded yet
    service.load()
    ids = list(service.encode("a€", add_special_tokens=False))
    assert [service.ends_whole(ids[:count]) for count in range(1, len(ids) + 1)] == [True, False, False, True]
    assert not service.ends_whole([*ids, 1])  # the end of an answer
