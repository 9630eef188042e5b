"""The help of every command ends with an example, and the command takes it."""

from __future__ import annotations

import argparse
import shlex

import pytest

from gateway.cli.examples import EXAMPLES, parsers_of
from gateway.cli.main import build_parser

PARSERS = {parser.prog: parser for parser in parsers_of(build_parser())}
LINE_CHARS = 80


def test_all_commands_are_walked() -> None:
    assert {
        "peerkv",
        "peerkv doctor",
        "peerkv kv pin",
        "peerkv kv export",
        "peerkv keys rotate",
        "peerkv vault",
    } <= PARSERS.keys()
    assert len(PARSERS) == len(EXAMPLES)


@pytest.mark.parametrize("prog", PARSERS)
def test_the_help_ends_with_an_example_of_that_command(prog: str) -> None:
    last = PARSERS[prog].format_help().rstrip().splitlines()
    example = " ".join(last)[" ".join(last).rindex("Example: ") + len("Example: ") :]
    assert example.startswith("peerkv ")
    assert example.startswith(prog)
    if " -- " not in example:  # which is told of in the same paragraph
        assert last[-1] == f"Example: {example}"  # in one line, so that it can be copied
        assert len(last[-1]) <= LINE_CHARS


@pytest.mark.parametrize("example", EXAMPLES.values())
def test_each_example_is_taken(example: str) -> None:
    words = shlex.split(example)
    ours = words[: words.index("--")] if "--" in words else words
    found: argparse.Namespace = build_parser().parse_args(ours)
    assert callable(found.run)
    assert found.takes_vllm_args >= ("--" in words)
