"""The front door's bounds fit to the descriptors that this process may open."""

import pytest

from gateway.serve.descriptors import RESERVED, fitted, in_words
from gateway.settings import Settings


def test_enough_descriptors_change_nothing() -> None:
    settings = Settings()
    got = fitted(settings, 524288, 30)
    assert got == settings
    assert in_words(settings, got, 524288) == ""


@pytest.mark.parametrize("descriptors", [1, 256, 1024, 4096])
def test_what_is_let_in_never_needs_more_descriptors_than_there_are(descriptors: int) -> None:
    got = fitted(Settings(), descriptors, 30)
    assert got.requests_in_flight_max >= 1
    assert got.connections_max >= got.requests_in_flight_max
    assert got.connections_max + got.requests_in_flight_max <= max(4, descriptors - RESERVED - 30)


def test_what_is_lowered_is_said_with_a_remedy() -> None:
    settings = Settings(requests_in_flight_max=10)
    words = in_words(settings, fitted(settings, 1024, 30), 1024)
    assert words.startswith("1024 descriptors are too few, so connections_max from 4096 to ")
    assert "requests_in_flight_max" not in words
