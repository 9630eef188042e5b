"""What is said of flags that a command does not know."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

_CLOSE = 0.75


def unknown_words(parser: argparse.ArgumentParser, words: Sequence[str], *, takes_vllm_args: bool) -> str:
    """One line about `words`, which the command of `parser` does not take: what may have been meant, and where vLLM's go."""
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    text = f"{parser.prog} does not take {' '.join(flags or words)}"
    known = [option for action in parser._actions for option in action.option_strings]
    close = [(flag, near[0]) for flag in flags if (near := difflib.get_close_matches(flag, known, 1, _CLOSE))]
    if close:
        text += ": " + ", ".join(f"did you mean {near}?" for _, near in close)
    if takes_vllm_args and len(close) < len(flags):
        text += f"; vLLM's own arguments follow --, as in: {parser.prog} MODEL -- {' '.join(words)}"
    return f"{text}; see {parser.prog} --help"
