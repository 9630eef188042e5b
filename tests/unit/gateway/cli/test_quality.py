"""`peerkv quality` shows what the measuring process says, or why there is nothing to show."""

import argparse
import io
import json
import sys

import msgspec
import pytest
from rich.console import Console

from engine.quality.results import Given, Line, Results, Row
from gateway.cli import quality
from gateway.cli.main import main
from transport.frames.codecs import NAMES

ROWS = (
    Row("raw", "exact", 23046.5, 0.0, 0.0, 1.0, 17.6, 0.0, 0.0, 0.0, 32.0, None, None),
    Row("int8", "lossy", 11887.5, 5e-5, 5e-4, 0.996, 17.6, 0.0001, -0.001, 0.002, 32.0, 39.2, 43.6),
)
RESULTS = Results(Given("/models/small", ("raw", "int8")), 8, 1.0, ROWS)


def child(*lines, status=0):
    """Return a command that writes these lines."""
    words = b"\n".join(msgspec.json.encode(line) for line in lines).decode()
    return [sys.executable, "-c", f"import sys; print(sys.argv[1]); sys.exit({status})", words]


def silent():
    return Console(file=io.StringIO(), width=200)


def test_progress_is_shown_and_the_last_line_has_the_results():
    console = silent()
    assert quality.measured(child(Line(1, 4, "document 1: frames"), Line(results=RESULTS)), console) == RESULTS
    assert "document 1: frames" in console.file.getvalue()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (child(Line(0, 4, "text"), Line(error="no network"), status=1), "no network"),
        (child(Line(0, 4, "text"), status=1), "without a result"),
        ([sys.executable, "-c", "print('hello')"], "not a result"),
    ],
)
def test_a_measurement_that_failed_says_why(command, words):
    with pytest.raises(quality.QualityNotMeasured, match=words):
        quality.measured(command, silent())


def test_figures_are_printed_written_and_plotted(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(quality, "measured", lambda command, console: asked.append(command) or RESULTS)
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    flags = [
        "small",
        "--codecs",
        "raw",
        "int8",
        "--documents",
        "2",
        "--json",
        str(tmp_path / "q.json"),
        "--plot",
        str(tmp_path / "q.svg"),
    ]
    console = silent()
    assert quality.run(parser.parse_args(flags), console) == 0
    given = msgspec.json.decode(asked[0][3], type=Given)
    assert (given.model, given.codecs, given.documents, given.prefix_tokens) == ("small", ("raw", "int8"), 2, 512)
    assert "11,888" in console.file.getvalue()
    assert "-0.10 to +0.20" in console.file.getvalue()
    assert json.loads((tmp_path / "q.json").read_text())["rows"][1]["keys_decibels"] == 39.2
    assert "int8" in (tmp_path / "q.svg").read_text()


def test_wrong_usage_is_refused_before_minutes_pass(capsys, tmp_path):
    assert main(["quality", "small", "--prefix-tokens", "100"]) == 1
    assert "multiple of --block-size" in capsys.readouterr().err
    assert main(["quality", "small", "--json", str(tmp_path / "none" / "q.json")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_every_codec_can_be_asked_for():
    assert quality.CODECS == NAMES
