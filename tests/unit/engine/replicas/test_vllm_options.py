"""Every front-end option of the installed vLLM is honoured or refused with a word."""

from typing import Any

import pytest

from engine.replicas.vllm_options import REFUSED, refusals, schedules_by_priority

# These do in a replica what they say, also for clients behind the front door, or they are the replica's own business.
HONOURED = frozenset(
    [
        "--anthropic-disabled-thinking-effort",
        "--chat-template",
        "--chat-template-content-format",
        "--cohere-format",
        "--default-chat-template-kwargs",
        "--disable-access-log-for-endpoints",
        "--disable-uvicorn-access-log",
        "--enable-auto-tool-choice",
        "--enable-force-include-usage",
        "--enable-log-deltas",
        "--enable-log-outputs",
        "--enable-per-request-metrics",
        "--enable-prompt-tokens-details",
        "--enable-request-id-headers",  # the front door always sends x-request-id
        "--exclude-tools-when-tool-choice-none",
        "--fingerprint-mode",
        "--fingerprint-value",
        "--log-error-stack",
        "--lora-modules",
        "--max-log-len",
        "--response-role",
        "--return-tokens-as-token-ids",
        "--sse-keep-alive-interval",
        "--tool-call-parser",
        "--tool-parser-plugin",
        "--tool-strict-level",
        "--trust-request-chat-template",
        "--trust-request-mm-kwargs",
        "--uvicorn-log-level",
    ]
)


def why(*words: str) -> list[str]:
    return list(refusals(words))


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """vLLM's options by the title of their group, without negations."""
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: Any = make_arg_parser(FlexibleArgumentParser())
    return {
        group.title: {word for action in group._group_actions for word in action.option_strings if not word.startswith("--no-")}
        for group in parser._action_groups
    }


def test_every_front_end_option_of_the_installed_vllm_was_weighed(options: dict[str, set[str]]) -> None:
    assert len(options["Frontend"]) > 50
    assert options["Frontend"] - REFUSED.keys() == HONOURED
    assert {"--headless", "--config", "--grpc", "--api-server-count", "-asc"} <= options["options"] & REFUSED.keys()
    parallel = {word for word in options["ParallelConfig"] if "data-parallel" in word or word.startswith("-dp")}
    assert parallel <= REFUSED.keys()


@pytest.mark.parametrize(
    ("words", "by_priority"),
    [
        ((), False),
        (("--scheduling-policy", "priority"), True),
        (("--scheduling_policy=priority",), True),
        (("--scheduling-policy", "priority", "--scheduling-policy=fcfs"), False),
        (("--scheduling-policy",), False),
    ],
)
def test_it_is_seen_whether_vllm_schedules_by_priority(words: tuple[str, ...], by_priority: bool) -> None:
    assert schedules_by_priority(words) is by_priority


def test_what_is_refused_exists(options: dict[str, set[str]]) -> None:
    assert REFUSED.keys() <= set().union(*options.values())


def test_no_other_option_is_taken_for_an_abbreviation_of_a_refused_one(options: dict[str, set[str]]) -> None:
    for option in set().union(*options.values()) - REFUSED.keys():
        assert not why(option), option
        assert not why(f"{option}=1"), option


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_a_refusal_names_the_option_and_says_why(option: str) -> None:
    assert why(option, "x") == [f"vLLM option {option} cannot be passed on: {REFUSED[option]}"]
    assert why(f"{option}=x") == why(option)


def test_other_spellings_of_an_option_are_refused_too() -> None:
    assert why("--allowed_origins", '["*"]') == [
        "vLLM option --allowed_origins cannot be passed on: " + REFUSED["--allowed-origins"]
    ]
    assert "(--allowed-origins)" in why("--allowed-orig", '["*"]')[0]
    assert "(--enable-flash-late-interaction)" in why("--no-enable-flash-late-interaction")[0]


def test_values_are_no_options() -> None:
    assert why("--chat-template", "model", "port", "--max-model-len", "-1") == []
