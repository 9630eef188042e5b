"""What `python -m tests.real.simulated` reckons, without a real fleet."""

from dataclasses import replace

import pytest

from bench.simulate.policies import Choice
from bench.simulate.profiles import CPU_SMOLLM2, Profile
from bench.simulate.simulation import Fleet, Simulation
from bench.simulate.traces import Trace, TraceRequest, made_up
from tests.real.calibration import DECODING_TOGETHER, SIZES, Measured, fitted
from tests.real.simulated import BLOCK_TOKENS, SHAPE, Result, compare, play_simulated, rate_for, sped_up
from tests.unit.bench.simulate.test_engine import Told

KNOWN = replace(
    CPU_SMOLLM2, engine=replace(CPU_SMOLLM2.engine, decode_seconds_context_token=0.0, response_seconds=0.0, contention=0.25)
)


def _alone(profile: Profile, *requests: TraceRequest, to: tuple[Choice, ...]) -> list[float]:
    fleet = Fleet(profile, 2, BLOCK_TOKENS)
    played = Simulation(Trace("alone", BLOCK_TOKENS, requests), fleet, Told(*to)).run()
    return [job.first_token - job.arrived for job in played.jobs]


def _measured(profile: Profile) -> Measured:
    """What a fleet of that profile would answer to the calibration's requests."""
    cold, hit, imported = {}, {}, {}
    for size in SIZES:
        blocks = tuple(range(-(-size // BLOCK_TOKENS)))
        asked = [TraceRequest(100.0 * turn, size, 1, blocks, 0) for turn in range(3)]
        cold[size], hit[size], imported[size] = _alone(profile, *asked, to=(Choice(0), Choice(0), Choice(1, source=0)))
    engine = profile.engine
    together = engine.decode_step_seconds + DECODING_TOGETHER * engine.decode_seconds_sequence
    return Measured(
        cold,
        hit,
        imported,
        engine.decode_step_seconds + engine.decode_seconds_sequence,
        together,
        engine.contention,
        engine.kv_blocks,
    )


def test_a_calibrated_engine_behaves_as_the_one_it_was_measured_on() -> None:
    calibrated = fitted(_measured(KNOWN))
    shape = made_up(replace(SHAPE, conversations=40), 3, block_tokens=BLOCK_TOKENS)
    trace = sped_up(shape, rate_for(KNOWN, shape, 0.5))
    known, ours = play_simulated(KNOWN, trace, trace), play_simulated(calibrated, trace, trace)
    assert ours.percentile(50) == pytest.approx(known.percentile(50), rel=0.1)
    assert ours.percentile(90) == pytest.approx(known.percentile(90), rel=0.1)


def test_noise_that_makes_a_term_negative_leaves_it_out() -> None:
    measured = _measured(KNOWN)
    hit = dict(zip(SIZES, (0.09, 0.08, 0.07, 0.06, 0.05), strict=True))  # shorter with size: nonsense
    engine = fitted(replace(measured, hit=hit)).engine
    assert engine.request_seconds_token == 0.0
    assert engine.prefill_seconds_token > 0
    assert engine.request_seconds >= 0


def test_a_simulation_is_good_within_the_tolerance_at_both_percentiles() -> None:
    real = Result([1.0] * 80 + [5.0] * 20, 0.4, 0.1)
    assert compare(real, Result([1.15] * 80 + [4.5] * 20, 0.4, 0.1))[1]
    assert not compare(real, Result([1.25] * 80 + [5.0] * 20, 0.4, 0.1))[1]
    assert not compare(real, Result([1.0] * 80 + [3.9] * 20, 0.4, 0.1))[1]
