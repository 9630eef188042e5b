"""`peerkv quality`: what codecs do to a model's answers. `engine.quality` measures, in a process of its own; this shows it."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from engine.quality.results import Given, Line, Results, Row
from gateway.cli.plot import line_chart
from gateway.errors import GatewayError

ABOUT = (
    "Compute the KV of real text, send it through each codec, and compare what the model predicts from what comes out. Needs "
    "transformers, which comes with vLLM, and no GPU; on two CPU cores it takes minutes. Texts are Wikipedia's unless given."
)
CODECS = ("raw", "raw-z", "int8", "rot4", "rot3", "mix", "neurokv")
_COLUMNS = ("codec", "class", "bytes/token", "KL mean", "KL p99", "top-1 %", "perplexity %", "95 %", "greedy", "K dB", "V dB")


class QualityNotMeasured(GatewayError):
    """The message says why, and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags to `parser`."""
    usual = Given("", CODECS)
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="directory or hub id of a model (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS), help="codecs to compare (default: all)")
    for name, words in (
        ("documents", "number of documents"),
        ("prefix_tokens", "tokens of each whose KV is coded, whole blocks"),
        ("scored_tokens", "tokens behind them that are predicted"),
        ("greedy_tokens", "tokens of each answer"),
        ("block_size", "tokens of a frame"),
    ):
        default = getattr(usual, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=_count, default=default, metavar="N", help=f"{words} (default: {default})")
    parser.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", default=[], help="texts to measure with, one document each"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot divergence by bytes per token to FILE, as SVG")


def run(arguments: argparse.Namespace, console: Console | None = None, progress_console: Console | None = None) -> int:
    """Measure and print; return the exit status. Raises QualityNotMeasured."""
    for path in (arguments.json, arguments.plot):
        if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            raise QualityNotMeasured(f"{path} cannot be written: choose a file in an existing directory that you can write to")
    if arguments.prefix_tokens % arguments.block_size:
        raise QualityNotMeasured(f"--prefix-tokens must be a multiple of --block-size, {arguments.block_size}")
    given = Given(
        arguments.model or _default_model(),
        tuple(arguments.codecs),
        arguments.documents,
        arguments.prefix_tokens,
        arguments.scored_tokens,
        arguments.greedy_tokens,
        arguments.block_size,
    )
    command = [sys.executable, "-m", "engine.quality", msgspec.json.encode(given).decode(), *map(str, arguments.text)]
    results = measured(command, progress_console or Console(stderr=True))
    (console or Console()).print(table(results))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(msgspec.to_builtins(results), indent=1) + "\n")
    if arguments.plot is not None:
        arguments.plot.write_text(picture(results))
    return 0


def measured(command: Sequence[str], console: Console) -> Results:
    """Run the measuring process, showing how far it is. Raises QualityNotMeasured."""
    columns = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    last = Line()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            with Progress(*columns, console=console) as progress:
                bar = progress.add_task("quality", total=None)
                for line in process.stdout:
                    last = msgspec.json.decode(line, type=Line)
                    if last.results is None and not last.error:
                        progress.update(bar, completed=last.done, total=last.total, description=last.words)
        except msgspec.MsgspecError as error:
            raise QualityNotMeasured(f"the measuring process wrote what is not a result: {error}") from error
        finally:
            process.terminate()
    if last.results is None:
        raise QualityNotMeasured(last.error or "the measuring process ended without a result (see above)")
    return last.results


def table(results: Results) -> Table:
    """Return the figures as a table."""
    given = results.given
    title = (
        f"{Path(given.model).name}: {results.documents} documents, {given.prefix_tokens} tokens coded in blocks of "
        f"{given.block_size}, {given.scored_tokens} predicted, {given.greedy_tokens} answered"
    )
    shown = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in _COLUMNS:
        shown.add_column(column, justify="left" if column in ("codec", "class") else "right")
    for row in results.rows:
        shown.add_row(*_cells(row))
    return shown


def _cells(row: Row) -> list[str]:
    decibels = ["-" if value is None else f"{value:.1f}" for value in (row.keys_decibels, row.values_decibels)]
    return [
        row.name,
        row.quality,
        f"{row.token_bytes:,.0f}",
        f"{row.divergence_mean:.5f}",
        f"{row.divergence_p99:.4f}",
        f"{100 * row.agreement:.1f}",
        f"{100 * row.perplexity_change:+.2f}",
        f"{100 * row.perplexity_change_low:+.2f} to {100 * row.perplexity_change_high:+.2f}",
        f"{row.equal_tokens:g}",
        *decibels,
    ]


def picture(results: Results) -> str:
    """Return a plot of the mean divergence by bytes per token, as SVG; what does not diverge has no place on its scale.

    Raises QualityNotMeasured if nothing does.
    """
    lines = {row.name: [(round(row.token_bytes), row.divergence_mean)] for row in results.rows if row.divergence_mean > 1e-12}
    try:
        return line_chart("Divergence of the next token from that with raw KV", "bytes per token", "KL, nats", lines)
    except ValueError as error:
        raise QualityNotMeasured(f"nothing to plot: {error}") from error


def _default_model() -> str:
    done = subprocess.run([sys.executable, "-m", "engine.default_model"], stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not lines:
        raise QualityNotMeasured("the default model could not be prepared (see above); name another one: peerkv quality MODEL")
    return lines[-1]


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value
