"""The table of bench.continuity, and what it takes for the same stream."""

from dataclasses import replace

import pytest

from bench.continuity import Stream, show

WHOLE = Stream("replica-0", "one two", [1, 2], "length", (3, 2), "", {"id"}, [0.0, 0.1, 0.3])


def test_the_table_has_a_row_for_each_form_that_was_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    cut = replace(WHOLE, came_at=[0.0, 0.1, 2.1])
    show([("completions", cut, WHOLE, True), ("completions", WHOLE, WHOLE, False)])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("| streams | all | cut | as undisturbed |")
    assert rows == ["| completions | 2 | 1 | 2 | 2.00 | 2.00 | 0.150 |"]


@pytest.mark.parametrize(
    "change",
    [
        {"text": "one"},
        {"ids": [1, 3]},
        {"finish": None},
        {"usage": (3, 3)},
        {"error": "lost"},
        {"stream_ids": {"id", "another"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_stream_in_which_a_client_could_tell_a_difference_is_not_the_same(change: dict[str, object]) -> None:
    assert WHOLE.same_as(WHOLE)
    assert not replace(WHOLE, **change).same_as(WHOLE)  # type: ignore[arg-type]
