"""Figures are those that can be worked out by hand."""

import numpy as np
import pytest

from engine.quality.dropping import kept
from engine.quality.scores import Noise, compare, first_difference, perplexity_change


def test_a_prediction_is_compared_by_divergence_likeliest_token_and_loss():
    reference, other = (
        np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32)),
        np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32)),
    )
    found = compare(reference, other, np.array([0, 1]))
    assert found.divergence == pytest.approx([0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0.0], abs=1e-6)
    assert found.agrees.tolist() == [False, True]
    assert found.loss == pytest.approx([np.log(4), np.log(10)], abs=1e-5)


def test_a_change_of_perplexity_has_an_interval_over_documents():
    references = [np.full(10, 2.0, np.float32)] * 4
    change, low, high = perplexity_change([each + 0.1 for each in references], references)
    assert (change, low, high) == pytest.approx((np.expm1(0.1),) * 3, rel=1e-5)
    losses = [each + more for each, more in zip(references, (0.0, 0.0, 0.0, 0.4), strict=True)]
    change, low, high = perplexity_change(losses, references)
    assert low == pytest.approx(0.0, abs=1e-6)
    assert change == pytest.approx(np.expm1(0.1), rel=1e-5)
    assert low < change < high


def test_answers_are_equal_up_to_their_first_difference():
    assert first_difference(np.array([1, 2, 3]), np.array([1, 2, 4])) == 2
    assert first_difference(np.array([1, 2, 3]), np.array([1, 2, 3])) == 3


def test_signal_to_noise_is_in_decibels():
    noise = Noise()
    noise.add(np.ones(4, np.float32), np.ones(4, np.float32))
    assert noise.decibels is None
    noise.add(np.ones(4, np.float32) * 10, np.ones(4, np.float32) * 9)
    assert noise.decibels == pytest.approx(10 * np.log10(404 / 4))


def test_dropping_keeps_the_first_token_the_last_ones_and_those_attended_to_most():
    attention = np.zeros(512)
    attention[100:196] = np.arange(96) + 1
    attention[300:] = 500
    stays = kept(attention)
    assert stays.sum() == 353
    assert np.flatnonzero(stays).tolist() == [0, *range(100, 196), *range(256, 512)]
