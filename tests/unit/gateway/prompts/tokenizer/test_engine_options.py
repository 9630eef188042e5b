"""What vLLM's arguments say of token ids."""

import pytest

from gateway.prompts.tokenizer.engine_options import source_from_arguments
from gateway.prompts.tokenizer.model_files import TokenizerSource

EXCLUDE = "--exclude-tools-when-tool-choice-none"


def test_the_engines_arguments_decide_which_tokenizer_it_is() -> None:
    arguments = [
        "--tokenizer=org/other", "--tokenizer-revision", "r2", "--chat_template", "t.jinja", "--tokenizer-mode", "auto",
        "--default-chat-template-kwargs", '{"enable_thinking": false}', "--download-dir=/models", "--max-model-len", "9",
        "--chat-template-content-format", "openai",
    ]  # fmt: skip
    assert source_from_arguments("org/model", arguments) == TokenizerSource(
        "org/other", "r2", "/models", "t.jinja", {"enable_thinking": False}, "openai", "auto", config_of="org/model"
    )
    assert source_from_arguments("org/model", ["--revision", "r1"]) == TokenizerSource("org/model", "r1")
    assert source_from_arguments("m", ["--default-chat-template-kwargs", "oops"]) == TokenizerSource("m")
    assert source_from_arguments("m", ["--hf-config-path", "c", "--tokenizer-mode", "HF"]) == TokenizerSource(
        "m", mode="hf", config_of="c"
    )


@pytest.mark.parametrize(
    ("arguments", "excluded"),
    [
        ([], False),
        ([EXCLUDE], True),
        (["--exclude_tools_when_tool_choice_none"], True),
        (["--exclude-tools"], True),
        ([EXCLUDE, "--no-exclude-tools-when-tool-choice-none"], False),
        (["--no-exclude-tools-when-tool-choice-none", EXCLUDE], True),
        (["--chat-template", "x", EXCLUDE, "--seed", "1"], True),
    ],
)
def test_tools_are_excluded_in_every_spelling(arguments: list[str], excluded: bool) -> None:
    assert source_from_arguments("m", arguments).exclude_tools is excluded


def test_abbreviations_count_where_they_fit_one_option() -> None:
    assert source_from_arguments("m", ["--tokenizer-m", "slow"]).mode == "slow"
    assert source_from_arguments("m", ["--tokenizer", "t"]).model == "t"  # whole, though two others begin so
    assert source_from_arguments("m", ["--token", "t"]) == TokenizerSource("m")


@pytest.mark.parametrize("option", ["--enable-prompt-embeds", "--skip-tokenizer-init"])
def test_with_another_tokenizer_in_the_engine_no_ids_are_known(option: str) -> None:
    assert "engine" in source_from_arguments("m", [option]).unlike


def test_every_option_is_one_of_the_installed_vllms() -> None:
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from gateway.prompts.tokenizer.engine_options import _SWITCHES, _VALUED

    known = make_arg_parser(FlexibleArgumentParser())._option_string_actions
    assert {f"--{name}" for name in (*_VALUED, *_SWITCHES)} <= known.keys()
    assert all(known[f"--{name}"].nargs == 0 for name in _SWITCHES)
