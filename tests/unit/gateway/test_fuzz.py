"""A few of the requests that `make fuzz` makes thousands of: no server error, and nothing that the document does not say."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import main

CASES_MIN = 50


def test_generated_requests_are_answered_as_the_document_says(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--examples", "3", "--phases", "examples,fuzzing", "--cases-min", str(CASES_MIN)]) == 0, capfd.readouterr().out
