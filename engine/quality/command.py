"""`python -m engine.quality REQUEST`: measures what a request (JSON, `results.Given`) asks for; lines of JSON on stdout."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine.quality import text
from engine.quality.comparison import STEPS_EACH, compared
from engine.quality.errors import QualityNotMeasured
from engine.quality.results import Given, Line, Results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m engine.quality", description="Measure codecs; see `peerkv quality`.")
    parser.add_argument("request", help="JSON")
    parser.add_argument("texts", nargs="*", type=Path)
    given = parser.parse_args(arguments)
    try:
        _say(Line(results=_measure(msgspec.json.decode(given.request, type=Given), given.texts)))
    except (QualityNotMeasured, msgspec.MsgspecError) as error:
        _say(Line(error=str(error)))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _measure(given: Given, texts: Sequence[Path]) -> Results:
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if Path(given.model).is_dir() else "0")
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    total, done = given.documents * STEPS_EACH, 0
    _say(Line(0, total, "text"))
    found = text.files(texts) if texts else text.articles()
    _say(Line(0, total, "model"))
    from engine.quality.model import Model  # torch and transformers take seconds: after the text, which may fail

    begun = time.monotonic()
    model = Model(Path(given.model))
    least = given.prefix_tokens + given.scored_tokens + 1
    ids = (model.token_ids(each[: least * 16]) for each in found)
    documents = [tokens for tokens in ids if len(tokens) >= least][: given.documents]

    def step(words: str) -> None:
        nonlocal done
        _say(Line(done, len(documents) * STEPS_EACH, words))
        done += 1

    rows = compared(model, documents, given, step)
    return Results(given, len(documents), time.monotonic() - begun, tuple(rows))


def _say(line: Line) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()
