"""What is said of flags that a command does not know."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

from gateway.cli.flag_groups import OF_GATEWAY, OF_REPLICAS
from gateway.cli.flags import WITHOUT_FLAG
from gateway.settings import ENV_PREFIX

_CLOSE = 0.75
_HALVES = {
    "peerkv gateway": (OF_REPLICAS, "`peerkv engine`; the gateway takes the replicas as it finds them"),
    "peerkv engine": (OF_GATEWAY, "`peerkv gateway`; this command runs only the replicas"),
}
"""Flags that the other half of `peerkv serve` takes, by the command."""


def unknown_words(parser: argparse.ArgumentParser, words: Sequence[str], *, takes_vllm_args: bool) -> str:
    """One line about `words`, which the command of `parser` does not take: what may have been meant, and where vLLM's go."""
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    text = f"{parser.prog} does not take {' '.join(flags or words)}"
    known = [option for action in parser._actions for option in action.option_strings]
    for flag in flags:
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        if name in WITHOUT_FLAG:
            return f"{text}: it has no flag, but the variable {ENV_PREFIX}{name.upper()}, or {name} in the file of --config"
        if (half := _HALVES.get(parser.prog)) is not None and name in half[0]:
            return f"{flag} is for {half[1]}"
    close = [(flag, near[0]) for flag in flags if (near := difflib.get_close_matches(flag, known, 1, _CLOSE))]
    if close:
        text += ": " + ", ".join(f"did you mean {near}?" for _, near in close)
    if takes_vllm_args and len(close) < len(flags):
        text += "" if close else ";"
        text += f" vLLM's own arguments follow --, as in: {parser.prog} MODEL -- {' '.join(words)}"
    return f"{text} See {parser.prog} --help" if text.endswith("?") else f"{text}; see {parser.prog} --help"
