"""The fit: it finds what is there, forgets what was, and does not believe everything."""

import random

import pytest

from gateway.steering.costs.fitting import Fit

TRUTH = (0.05, 2e-5)


def sample(rng: random.Random, truth: tuple[float, ...] = TRUTH, noise: float = 0.05) -> tuple[tuple[float, float], float]:
    x = (1.0, float(rng.randint(100, 30_000)))
    return x, sum(a * b for a, b in zip(x, truth, strict=True)) * rng.lognormvariate(0, noise)


def feed(fit: Fit, count: int, truth: tuple[float, ...] = TRUTH, noise: float = 0.05, seed: int = 1) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        fit.observe(*sample(rng, truth, noise))


def test_before_the_first_sample_the_prior_speaks() -> None:
    fit = Fit((0.1, 1e-3), 400)
    assert fit.coefficients == (0.1, 1e-3)
    assert fit.predict((1.0, 100.0)) == pytest.approx(0.2)


@pytest.mark.parametrize("wrong", [0.01, 0.3, 1.0, 5.0, 100.0])
def test_it_finds_what_is_there_however_wrong_the_prior_was(wrong: float) -> None:
    fit = Fit(tuple(value * wrong for value in TRUTH), 400)
    feed(fit, 60)
    for tokens in (200.0, 5000.0, 30_000.0):
        assert fit.predict((1.0, tokens)) == pytest.approx(TRUTH[0] + TRUTH[1] * tokens, rel=0.1)


def test_outliers_on_either_side_change_little() -> None:
    fit = Fit(TRUTH, 400)
    rng = random.Random(2)
    for place in range(200):
        x, y = sample(rng)
        fit.observe(x, y * (20.0 if place % 10 == 0 else 0.05 if place % 10 == 5 else 1.0))
    for tokens in (200.0, 5000.0, 30_000.0):
        assert fit.predict((1.0, tokens)) == pytest.approx(TRUTH[0] + TRUTH[1] * tokens, rel=0.2)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    fit = Fit(TRUTH, 100)
    feed(fit, 300)
    slower = (TRUTH[0] * 2, TRUTH[1] * 3)
    feed(fit, 300, slower)
    assert fit.predict((1.0, 20_000.0)) == pytest.approx(slower[0] + slower[1] * 20_000, rel=0.1)


def test_coefficients_never_fall_below_zero() -> None:
    fit = Fit((1.0, 1.0), 100)
    for size in range(1, 200):
        fit.observe((1.0, float(size)), max(0.001, 10.0 - size * 0.05))  # falls as x grows
        assert min(fit.coefficients) >= 0


def test_a_coefficient_that_samples_say_nothing_about_stays() -> None:
    fit = Fit((0.05, 2e-5), 100)
    for _ in range(500):
        fit.observe((1.0, 0.0), 0.2)
    assert fit.coefficients[0] == pytest.approx(0.2, rel=0.02)
    assert fit.coefficients[1] == pytest.approx(2e-5)


def test_the_usual_error_is_that_of_the_samples() -> None:
    fit = Fit(TRUTH, 400)
    feed(fit, 300, noise=0.1)
    assert 0.05 < fit.usual_error < 0.12


def test_a_prior_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Fit((0.0, 1.0), 10)


def test_a_coefficient_stays_below_its_bound_whatever_comes_with_it() -> None:
    fit = Fit((0.05, 0.001), 400, (float("inf"), 5.0))
    for place in range(100):
        fit.observe((1.0, float(place % 2)), 0.05 + 0.5 * (place % 2))
    assert fit.coefficients[1] == pytest.approx(0.005)
