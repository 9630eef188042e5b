"""Token ids: the files that decide them, and the service that keeps them."""

import json
from pathlib import Path

import pytest

from gateway.prompts.tokenizer.model_files import (
    ModelFilesError,
    TokenizerSource,
    find_directory,
    read_model_files,
    renderer_of_its_own,
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


def test_a_model_that_the_engine_renders_in_its_own_way_has_ids_for_completions_alone(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    (model / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}))
    tokens = service(model)
    assert tokens.encode("this")
    assert not tokens.state.chat
    assert "gpt_oss in its own way" in tokens.state.chat_reason
    with pytest.raises(NoTokenIds):
        tokens.encode_chat({"messages": [{"role": "user", "content": "this"}]})


def test_it_is_the_served_models_config_that_counts_and_not_the_tokenizers(tmp_path: Path) -> None:
    tokenizer, model = make_model(tmp_path / "t"), make_model(tmp_path / "m")
    (model / "config.json").write_text(json.dumps({"architectures": ["DeepseekV32ForCausalLM"]}))
    assert renderer_of_its_own(TokenizerSource(str(tokenizer))) == ""
    assert "DeepseekV32" in renderer_of_its_own(TokenizerSource(str(tokenizer), config_of=str(model)))


def test_mistrals_own_files_mean_mistrals_own_tokenizer(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    (model / "tekken.json").write_text("{}")
    assert renderer_of_its_own(TokenizerSource(str(model))) == ""
    (model / "consolidated.safetensors").write_text("")
    assert "Mistral" in renderer_of_its_own(TokenizerSource(str(model)))


def test_every_renderer_of_the_installed_vllm_is_known() -> None:
    """Beside HfRenderer's modes; each of the others is chosen by a mode, or by what `renderer_of_its_own` looks at."""
    pytest.importorskip("vllm")
    from vllm.renderers.registry import _VLLM_RENDERERS

    by_mode_alone = {"cohere", "terratorch"}
    by_model = {"deepseek_v32", "deepseek_v4", "deepseek_v41", "kimi_audio", "kimi_k3", "mistral", "inkling"}
    assert _VLLM_RENDERERS.keys() == {"hf"} | by_mode_alone | by_model


def test_an_engine_whose_tokenizer_is_another_gets_texts(tmp_path: Path) -> None:
    tokens = service(make_model(tmp_path), unlike="the engine has no tokenizer")
    assert (tokens.state.loaded, tokens.state.reason) == (False, "the engine has no tokenizer")


def test_tools_that_may_not_be_chosen_are_left_out_where_the_engine_does_so(tmp_path: Path) -> None:
    model = make_model(tmp_path, template=TEMPLATE + "{% if tools %}{{ tools | tojson }}{% endif %}")
    tool = {"type": "function", "function": {"name": "f"}}
    chat = {"messages": [{"role": "user", "content": "this"}]}
    offered = chat | {"tools": [tool], "tool_choice": "none"}
    without = service(model).encode_chat(chat)
    assert len(service(model).encode_chat(offered)) > len(without)
    excluding = service(model, exclude_tools=True)
    assert excluding.encode_chat(offered) == without
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": None}):
        assert len(excluding.encode_chat(chat | {"tools": [tool]} | choice)) > len(without)
