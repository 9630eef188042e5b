"""Token ids: the files that decide them, and the service that keeps them."""

import json
from pathlib import Path

import pytest

from gateway.prompts.tokenizer.model_files import (
    ModelFilesError,
    TokenizerSource,
    find_directory,
    read_model_files,
    source_from_arguments,
)
from gateway.prompts.tokenizer.service import NoTokenIds, TextTooLong, TokenService
from tests.unit.gateway.prompts.tiny_model import EOS, TEMPLATE, make_model, tiny_tokenizer


def service(directory: Path, **about: object) -> TokenService:
    tokens = TokenService(TokenizerSource(str(directory), **about))  # type: ignore[arg-type]
    tokens.load()
    return tokens


def test_a_completion_gets_bos_and_a_chat_does_not(tmp_path: Path) -> None:
    tokens = service(make_model(tmp_path))
    bare = tiny_tokenizer().encode("this", add_special_tokens=False).ids
    assert tokens.encode("this") == [0, *bare]
    assert tokens.encode("this", add_special_tokens=False) == bare
    assert tokens.encode_chat({"messages": [{"role": "user", "content": "this"}]}).count(0) == 1


def test_special_tokens_in_the_text_become_their_ids(tmp_path: Path) -> None:
    assert service(make_model(tmp_path)).encode("</s>", add_special_tokens=False) == [1]


def test_a_tokenizer_that_splits_special_tokens_takes_them_as_text(tmp_path: Path) -> None:
    tokens = service(make_model(tmp_path, split_special_tokens=True))
    assert len(tokens.encode("</s>", add_special_tokens=False)) == 4


def test_truncation_and_padding_in_the_tokenizer_file_do_not_count(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    assert len(service(make_model(tmp_path, tokenizer=tokenizer)).encode("abcdefgh")) == 9


def test_beside_a_tokenizer_file_the_configs_bos_and_eos_do_not_count(tmp_path: Path) -> None:
    tokens = service(make_model(tmp_path, add_bos_token=False, add_eos_token=True))
    assert tokens.encode("x") == [0, *tiny_tokenizer().encode("x", add_special_tokens=False).ids]


def test_a_named_token_that_the_vocabulary_lacks_is_added(tmp_path: Path) -> None:
    tokens = service(make_model(tmp_path, pad_token="<pad>", additional_special_tokens=["<extra>"]))
    assert tokens.encode("<pad><extra>", add_special_tokens=False) == [259, 260]


def test_a_repeated_long_prompt_gives_the_same_ids(tmp_path: Path) -> None:
    tokens = service(make_model(tmp_path))
    text = "the " * 2000
    expected = tiny_tokenizer().encode(text).ids
    assert [tokens.encode(text).tolist() for _ in range(2)] == [expected, expected]
    assert tokens.encode(text, add_special_tokens=False) == expected[1:]


def test_half_a_surrogate_pair_has_no_ids(tmp_path: Path) -> None:
    with pytest.raises(NoTokenIds):
        service(make_model(tmp_path)).encode("a\ud800b")


def test_a_text_that_can_not_fit_is_refused_without_being_tokenised(tmp_path: Path) -> None:
    tokens = service(make_model(tmp_path))
    with pytest.raises(TextTooLong) as refusal:  # the longest token, "</s>", has 4 characters
        tokens.encode("x" * 41, tokens_max=10)
    assert refusal.value.tokens_min == 11
    assert len(tokens.encode("x" * 40, tokens_max=10)) == 41


def test_files_that_come_later_are_found_by_a_second_load(tmp_path: Path) -> None:
    tokens = TokenService(TokenizerSource("org/model", cache_dir=str(tmp_path)))
    assert not tokens.load().loaded
    with pytest.raises(NoTokenIds, match="not in"):
        tokens.encode("x")
    with pytest.raises(NoTokenIds):
        tokens.encode_chat({"messages": [{"role": "user", "content": "x"}]})
    repository = tmp_path / "models--org--model"
    make_model(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert tokens.load().directory.endswith("snapshots/abc")
    assert tokens.encode("x")[0] == 0


@pytest.mark.parametrize(
    ("variable", "below"),
    [("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_the_hub_cache_is_where_the_environment_says(tmp_path: Path, variable: str, below: str) -> None:
    snapshot = tmp_path / below / "models--name" / "snapshots" / "rev1"
    snapshot.mkdir(parents=True)
    source = TokenizerSource("name", revision="rev1")
    assert find_directory(source, {variable: str(tmp_path)}) == snapshot


def test_a_broken_tokenizer_file_leaves_the_requests_without_ids(tmp_path: Path) -> None:
    (make_model(tmp_path) / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in service(tmp_path).state.reason


def test_another_tokenizer_mode_than_vllms_usual_one_is_not_followed(tmp_path: Path) -> None:
    assert not service(make_model(tmp_path), mode="mistral").state.loaded


def test_a_model_without_a_chat_template_still_tokenises_completions(tmp_path: Path) -> None:
    tokens = service(make_model(tmp_path, template=None))
    assert (tokens.state.loaded, tokens.state.chat) == (True, False)
    assert tokens.encode("x")


def test_a_template_file_wins_over_the_config_and_a_processors_file_comes_last(tmp_path: Path) -> None:
    make_model(tmp_path, template="file", chat_template="config")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    found = [read_model_files(TokenizerSource(str(tmp_path))).templates["default"]]
    (tmp_path / "chat_template.jinja").unlink()
    found.append(read_model_files(TokenizerSource(str(tmp_path))).templates["default"])
    make_model(tmp_path, template=None)
    found.append(read_model_files(TokenizerSource(str(tmp_path))).templates["default"])
    assert found == ["file", "config", "processor"]


def test_named_templates_come_from_the_config_or_from_files(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    make_model(tmp_path, template=None, chat_template=named)
    assert read_model_files(TokenizerSource(str(tmp_path))).templates == {"default": "d", "tool_use": "t"}
    make_model(tmp_path, template="file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    assert read_model_files(TokenizerSource(str(tmp_path))).templates == {"default": "file", "tool_use": "more"}


def test_the_engines_own_template_argument_is_a_path_or_a_template(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    (tmp_path / "given.jinja").write_text("from a file")
    for given, expected in ((str(tmp_path / "given.jinja"), "from a file"), (TEMPLATE, TEMPLATE)):
        source = TokenizerSource(str(tmp_path / "model"), chat_template=given)
        assert read_model_files(source).templates["default"] == expected
    assert read_model_files(TokenizerSource(str(tmp_path / "model"), chat_template="unknown.jinja")).templates == {}


def test_special_tokens_are_read_from_either_file(tmp_path: Path) -> None:
    make_model(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": "other"}))
    special = read_model_files(TokenizerSource(str(tmp_path))).special_tokens
    assert special == {"bos_token": "<s>", "eos_token": EOS, "pad_token": "<pad>"}


def test_a_damaged_config_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (make_model(tmp_path) / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ModelFilesError, match=r"tokenizer_config\.json"):
        read_model_files(TokenizerSource(str(tmp_path)))


def test_the_engines_arguments_decide_which_tokenizer_it_is() -> None:
    arguments = [
        "--tokenizer=org/other", "--tokenizer-revision", "r2", "--chat_template", "t.jinja", "--tokenizer-mode", "auto",
        "--default-chat-template-kwargs", '{"enable_thinking": false}', "--download-dir=/models", "--max-model-len", "9",
        "--chat-template-content-format", "openai",
    ]  # fmt: skip
    assert source_from_arguments("org/model", arguments) == TokenizerSource(
        "org/other", "r2", "/models", "t.jinja", {"enable_thinking": False}, "openai", "auto"
    )
    assert source_from_arguments("org/model", ["--revision", "r1"]) == TokenizerSource("org/model", "r1")
    assert source_from_arguments("m", ["--default-chat-template-kwargs", "oops"]) == TokenizerSource("m")
