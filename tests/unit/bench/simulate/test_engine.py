"""A simulated replica keeps to its profile, and to the ways of vLLM's scheduler."""

import itertools
from dataclasses import replace

import pytest

from bench.simulate.jobs import Job
from bench.simulate.policies import Choice
from bench.simulate.profiles import EngineProfile, LinkProfile, Profile
from bench.simulate.simulation import Fleet, Played, Simulation
from bench.simulate.traces import Trace, TraceRequest

BLOCK = 64

PLAIN = EngineProfile(
    block_tokens=16,
    kv_blocks=1024,
    kv_bytes_token=10,
    batched_tokens_max=256,
    sequences_max=8,
    prefill_step_seconds_min=0.0,
    prefill_step_seconds=0.0,
    prefill_seconds_token=1e-3,
    attention_seconds_pair=0.0,
    decode_step_seconds=0.01,
    decode_seconds_sequence=0.0,
    decode_seconds_context_token=0.0,
    request_seconds=0.0,
    request_seconds_token=0.0,
    response_seconds=0.0,
)
LINKS = LinkProfile(within_host_seconds=0.5, within_host_bytes_second=1000.0)


class Told:
    """Sends each request where the test says."""

    def __init__(self, *choices: Choice) -> None:
        self.choices = choices

    def choose(self, job: Job, now: float) -> Choice:
        return self.choices[job.tag % len(self.choices)]

    def first_byte(self, job: Job, now: float) -> None:
        pass

    def finished(self, job: Job, now: float) -> None:
        pass


_names = itertools.count(1000, 1000)


def request(arrival: float, tokens: int, *blocks: int, output: int = 1) -> TraceRequest:
    names = blocks or tuple(range(first := next(_names), first - (-tokens // BLOCK)))
    assert len(names) == -(-tokens // BLOCK)
    return TraceRequest(arrival, tokens, output, names, 0)


def play(*requests: TraceRequest, engine: EngineProfile = PLAIN, to: tuple[Choice, ...] = (Choice(0),)) -> Played:
    fleet = Fleet(Profile("test", engine, LINKS), 1 + max(choice.replica for choice in to), BLOCK)
    return Simulation(Trace("test", BLOCK, requests), fleet, Told(*to)).run()


def test_a_prompt_alone_takes_what_its_tokens_cost() -> None:
    (job,) = play(request(1.0, 200)).jobs
    assert job.first_token == pytest.approx(1.2)
    assert (job.computed_tokens, job.local_tokens) == (200, 0)


def test_each_step_of_a_prompt_has_its_fixed_cost() -> None:
    (job,) = play(request(0.0, 600), engine=replace(PLAIN, prefill_step_seconds=0.05)).jobs
    assert job.first_token == pytest.approx(0.6 + 3 * 0.05)


def test_attention_grows_with_the_square_whatever_the_chunks() -> None:
    engine = replace(PLAIN, prefill_seconds_token=0.0, attention_seconds_pair=1e-6)
    (job,) = play(request(0.0, 1000), engine=engine).jobs
    assert job.first_token == pytest.approx(1000 * 1000 / 2 * 1e-6)


def test_a_step_with_prompt_tokens_is_never_shorter_than_its_minimum() -> None:
    (job,) = play(request(0.0, 10), engine=replace(PLAIN, prefill_step_seconds_min=0.3)).jobs
    assert job.first_token == pytest.approx(0.3)


def test_answers_take_a_step_for_each_token_behind_the_first() -> None:
    (job,) = play(request(0.0, 100, output=11)).jobs
    assert job.finished - job.first_token == pytest.approx(10 * 0.01)


def test_decodes_slow_down_with_their_number_and_their_contexts() -> None:
    engine = replace(PLAIN, decode_seconds_sequence=0.001, decode_seconds_context_token=1e-5)
    (job,) = play(request(0.0, 100, output=4), engine=engine).jobs
    contexts = 100 + 101 + 102
    assert job.finished - job.first_token == pytest.approx(3 * (0.01 + 0.001) + contexts * 1e-5)


def test_a_newcomer_waits_for_the_step_under_way_and_not_for_the_answer() -> None:
    jobs = play(request(0.0, 100, output=100), request(0.125, 64, 7)).jobs
    assert jobs[1].scheduled == pytest.approx(0.1 + 3 * 0.01)
    assert jobs[1].first_token == pytest.approx(0.13 + 0.064)
    assert jobs[0].finished == pytest.approx(0.1 + 98 * 0.01 + 0.064)  # one of its steps also computed the newcomer's prompt


def test_a_prompt_is_cut_where_the_budget_of_a_step_ends_and_the_next_one_shares_the_step() -> None:
    jobs = play(request(0.0, 300), request(0.0, 100)).jobs
    assert jobs[0].first_token == pytest.approx(0.256 + 0.144)  # the rest of it, 44, with all of the other's 100
    assert jobs[1].first_token == jobs[0].first_token


def test_a_prefix_computed_before_is_not_computed_again() -> None:
    jobs = play(request(0.0, 150, 1, 2, 3), request(5.0, 160, 1, 2, 4)).jobs
    assert (jobs[1].local_tokens, jobs[1].computed_tokens) == (128, 32)


def test_at_least_the_last_token_is_computed() -> None:
    jobs = play(request(0.0, 128, 1, 2), request(5.0, 128, 1, 2)).jobs
    assert (jobs[1].local_tokens, jobs[1].computed_tokens) == (112, 16)


def test_requests_in_flight_share_what_the_same_step_computes() -> None:
    jobs = play(request(0.0, 100, 1, 2), request(0.0, 101, 1, 3)).jobs
    assert jobs[1].local_tokens == 64


def test_memory_for_a_whole_prompt_is_needed_before_it_begins() -> None:
    engine = replace(PLAIN, kv_blocks=20)
    jobs = play(request(0.0, 200, output=20), request(0.0, 160), engine=engine).jobs
    assert jobs[1].scheduled >= jobs[0].finished


def test_what_fits_nowhere_is_an_error() -> None:
    with pytest.raises(ValueError, match="larger than the KV cache"):
        play(request(0.0, 1000), engine=replace(PLAIN, kv_blocks=20))


def test_a_request_that_is_preempted_is_answered_all_the_same() -> None:
    engine = replace(PLAIN, kv_blocks=20)
    played = play(request(0.0, 100, output=150), request(0.0, 100, 8, 9, output=150), engine=engine)
    assert sum(e.preemptions for e in played.fleet.engines) >= 1
    assert all(job.finished and job.generated == 150 for job in played.jobs)
    assert all(job.computed_tokens + job.local_tokens == 100 for job in played.jobs)
    assert sum(job.recomputed_tokens for job in played.jobs) > 0


def test_no_memory_is_left_in_use_at_the_end() -> None:
    engine = replace(PLAIN, kv_blocks=40)
    played = play(*(request(0.05 * n, 100 + n, output=5 + n) for n in range(30)), engine=engine)
    cache = played.fleet.engines[0].cache
    assert cache.private_tokens == 0
    assert cache.room_tokens == 40 * 16
    assert played.fleet.engines[0].waiting_tokens == 0


def test_many_equal_steps_at_once_are_the_same_as_one_after_the_other() -> None:
    engine = replace(PLAIN, decode_seconds_context_token=1e-6, decode_seconds_sequence=1e-4)
    requests = [request(0.11 * n, 90 + 7 * n, output=40 + 13 * n % 50) for n in range(25)]
    together = play(*requests, engine=engine).jobs
    apart = play(*requests, engine=replace(engine, contention=1e-15)).jobs  # takes few steps at once
    for one, other in zip(together, apart, strict=True):
        assert one.first_token == pytest.approx(other.first_token, abs=1e-9)
        assert one.finished == pytest.approx(other.finished, abs=1e-9)


# Imports


def test_an_import_takes_link_time_and_the_rest_is_computed() -> None:
    jobs = play(request(0.0, 200, 1, 2, 3, 4), request(5.0, 210, 1, 2, 3, 5), to=(Choice(0), Choice(1, source=0))).jobs
    assert (jobs[1].peer_tokens, jobs[1].computed_tokens) == (192, 18)
    assert jobs[1].import_bytes == 1920
    assert jobs[1].import_seconds == pytest.approx(0.5 + 1.92)
    assert jobs[1].first_token == pytest.approx(5.0 + 0.5 + 1.92 + 0.018)


def test_only_what_is_missing_is_imported() -> None:
    to = (Choice(0), Choice(1), Choice(1, source=0))
    jobs = play(request(0.0, 200, 1, 2, 3, 4), request(0.0, 65, 1, 9), request(5.0, 210, 1, 2, 3, 5), to=to).jobs
    assert (jobs[2].local_tokens, jobs[2].peer_tokens) == (64, 128)


def test_a_split_imports_the_head_alone() -> None:
    to = (Choice(0), Choice(1, source=0, import_tokens_max=128))
    jobs = play(request(0.0, 200, 1, 2, 3, 4), request(5.0, 210, 1, 2, 3, 5), to=to).jobs
    assert (jobs[1].peer_tokens, jobs[1].computed_tokens) == (128, 82)


def test_others_are_computed_while_an_import_is_under_way() -> None:
    to = (Choice(0), Choice(1, source=0), Choice(1))
    jobs = play(request(0.0, 200, 1, 2, 3, 4), request(5.0, 210, 1, 2, 3, 5), request(5.1, 64, 6), to=to).jobs
    assert jobs[2].first_token == pytest.approx(5.1 + 0.064)


def test_a_source_that_has_nothing_is_not_waited_for() -> None:
    jobs = play(request(0.0, 64, 9), request(5.0, 100, 1, 2), to=(Choice(0), Choice(1, source=0))).jobs
    assert jobs[1].first_token == pytest.approx(5.1)
    assert jobs[1].import_bytes == 0


def test_what_the_owner_gives_up_during_a_copy_is_computed() -> None:
    engine = replace(PLAIN, kv_blocks=16)  # room for 256 tokens
    to = (Choice(0), Choice(1, source=0), Choice(0))
    jobs = play(
        request(0.0, 200, 1, 2, 3, 4), request(5.0, 210, 1, 2, 3, 5), request(5.1, 180, 7, 8, 9), engine=engine, to=to
    ).jobs
    assert jobs[1].stale_tokens > 0
    assert jobs[1].peer_tokens + jobs[1].computed_tokens == 210
    assert jobs[1].finished


def test_imported_blocks_are_offered_onward() -> None:
    to = (Choice(0), Choice(1, source=0), Choice(2, source=1))
    jobs = play(request(0.0, 200, 1, 2, 3, 4), request(5.0, 210, 1, 2, 3, 5), request(20.0, 210, 1, 2, 3, 6), to=to).jobs
    assert jobs[2].peer_tokens == 192
