"""What is in front of a request: tickets, the engines' own words, promises, and how popular a prefix is."""

from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.block_registry.chain import Chain
from gateway.steering.costs.model import pairs
from gateway.steering.costs.replica_load import IDLE
from gateway.steering.load import FleetLoad, Ticket
from gateway.steering.pending_prefixes import Promises, shared_blocks
from gateway.steering.popularity import FADE_SECONDS, Popularity
from transport.keys import chain_keys
from transport.table.deliveries import EngineLoad

BLOCK = 4
NEW_TOKEN, PAIR = 1e-3, 0.0


def chain_of(*tokens: int) -> Chain:
    return Chain.of(chain_keys(b"root", tokens, BLOCK))


def ticket(
    tag: int, replica: str = "a", new: int = 1000, cached: int = 0, source: str | None = None, chain: Chain | None = None
) -> Ticket:
    return Ticket(tag, replica, source, new + cached, cached, new, pairs(cached, new), 10.0, chain, BLOCK)


def ahead(load: FleetLoad, replica: str, now: float) -> float:
    return load.load(replica, now).ahead(now, NEW_TOKEN, PAIR)[0]


def test_a_replica_without_requests_is_idle() -> None:
    assert FleetLoad().load("a", 0.0) is IDLE
    assert IDLE.ahead(1.0, NEW_TOKEN, PAIR) == (0, 0)


def test_prompts_that_were_not_answered_are_ahead() -> None:
    load = FleetLoad()
    first, second = ticket(1, new=1000, cached=500), ticket(2, new=200)
    load.started(first, 0.0)
    load.started(second, 0.0)
    found = load.load("a", 0.0)
    assert (found.tokens, found.pairs, found.waiting, found.requests, found.decoding) == (
        1200,
        1000 * 1000 + 200 * 100,
        2,
        2,
        0,
    )
    load.first_byte(first, 1.0)
    found = load.load("a", 1.0)
    assert (found.tokens, found.waiting, found.requests, found.decoding) == (200, 1, 2, 1)
    load.finished(first, 2.0)
    load.finished(second, 2.0)
    assert load.load("a", 2.0).requests == 0
    assert load.in_flight() == {}


def test_time_that_passes_is_work_that_is_done_but_the_first_token_is_waited_for() -> None:
    load = FleetLoad()
    first = ticket(1, new=1000)
    load.started(first, 0.0)
    load.started(ticket(2, new=1000), 0.2)
    assert ahead(load, "a", 0.2) == pytest.approx(1800)
    assert ahead(load, "a", 0.5) == pytest.approx(1500)
    assert ahead(load, "a", 50.0) == pytest.approx(1100)
    load.first_byte(first, 50.0)
    assert ahead(load, "a", 50.0) == pytest.approx(1000)
    assert ahead(load, "a", 50.4) == pytest.approx(600)


def test_what_the_engine_says_counts_where_it_is_more() -> None:
    load = FleetLoad()
    load.heard("a", EngineLoad(waiting_requests=2, waiting_tokens=5000, decoding_requests=7))
    assert ahead(load, "a", 0.0) == 5000
    assert load.load("a", 0.0).decoding == 7
    one = ticket(1, new=9000)
    load.started(one, 0.0)
    assert ahead(load, "a", 0.0) == 9000
    load.heard("a", EngineLoad())
    assert ahead(load, "a", 0.0) == 9000
    load.finished(one, 0.0)
    assert ahead(load, "a", 0.0) == 0


def test_an_engine_knows_best_what_it_decodes() -> None:
    """Clients that read slowly would make an idle replica look crowded, and other gateways' answers a crowded one idle."""
    load = FleetLoad()
    for tag in range(1, 51):
        one = ticket(tag)
        load.started(one, 0.0)
        load.first_byte(one, 1.0)
    assert (load.load("a", 1.0).decoding, load.load("a", 1.0).requests) == (50, 50)
    load.heard("a", EngineLoad(decoding_requests=2))
    assert (load.load("a", 1.0).decoding, load.load("a", 1.0).requests) == (2, 2)
    load.heard("b", EngineLoad(waiting_requests=3, decoding_requests=70))
    assert load.load("b", 1.0).requests == 73
    load.forget("a")
    assert load.load("a", 1.0).decoding == 50


def test_an_answer_that_its_client_reads_for_an_hour_does_not_stand_for_all() -> None:
    load = FleetLoad()
    for tag, seconds in enumerate([4.0, 4.0, 3600.0], 1):
        one = ticket(tag)
        load.started(one, 0.0)
        load.first_byte(one, 0.0)
        load.finished(one, seconds)
    assert load.decode_seconds == pytest.approx(4.0 + 0.1 * 12.0)


def test_words_of_an_engine_that_is_gone_do_not_count() -> None:
    load = FleetLoad()
    load.heard("a", EngineLoad(waiting_tokens=5000))
    load.forget("a")
    assert ahead(load, "a", 0.0) == 0


def test_imports_count_at_both_ends_until_the_first_token() -> None:
    load = FleetLoad()
    one = ticket(1, "b", new=10, cached=990, source="a")
    load.started(one, 0.0)
    assert (load.load("b", 0.0).importing, load.load("a", 0.0).reading) == (1, 1)
    load.first_byte(one, 1.0)
    assert (load.load("b", 1.0).importing, load.load("a", 1.0).reading) == (0, 0)


def test_a_first_byte_counts_once_and_of_known_requests_only() -> None:
    load = FleetLoad()
    one, unknown = ticket(1), ticket(5)
    load.first_byte(unknown, 0.0)
    load.finished(unknown, 0.0)
    load.started(one, 0.0)
    load.first_byte(one, 1.0)
    load.first_byte(one, 2.0)
    load.finished(one, 3.0)
    assert load.decode_seconds == pytest.approx(2.0)


def test_a_silent_request_is_taken_to_have_its_first_token_when_it_was_expected() -> None:
    load = FleetLoad()
    one = ticket(1, new=1000)
    load.started(one, 0.0, silent=True)
    assert load.load("a", 9.0).decoding == 0
    assert (load.load("a", 10.0).decoding, load.load("a", 10.0).tokens) == (1, 0)
    load.finished(one, 12.0)
    assert load.in_flight() == {}


def test_what_is_being_computed_is_promised_until_it_is_there() -> None:
    load = FleetLoad()
    one = ticket(1, chain=chain_of(*range(40)))
    load.started(one, 0.0)
    assert load.promised(chain_of(*range(30), *range(100, 120)), BLOCK) == {"a": 28}
    assert load.promised(chain_of(*range(7, 40)), BLOCK) == {}
    assert load.promised(chain_of(*range(40)), 2 * BLOCK) == {}
    load.first_byte(one, 1.0)
    assert load.promised(chain_of(*range(40)), BLOCK) == {}


def test_the_longest_promise_of_a_replica_is_the_one_that_counts() -> None:
    promises = Promises()
    promises.add(ticket(1, "a", chain=chain_of(*range(16), 99, 99, 99, 99)))
    promises.add(ticket(2, "a", chain=chain_of(*range(24))))
    promises.add(ticket(3, "b", chain=chain_of(*range(20))))
    promises.add(ticket(4, "b", chain=chain_of(*range(16))))
    assert promises.find(chain_of(*range(28)), BLOCK) == {"a": 24, "b": 20}


def test_promises_leave_nothing_behind() -> None:
    promises = Promises()
    tickets = [ticket(tag, chain=chain_of(*range(tag))) for tag in range(50)]
    for each in tickets:
        promises.add(each)
    assert len(promises) > 0
    for each in tickets:
        promises.remove(each)
        promises.remove(each)
    assert len(promises) == 0


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_shared_blocks_are_those_before_the_first_difference(same: int, ours: int, theirs: int) -> None:
    one = chain_of(*range(same * BLOCK), *range(1000, 1000 + ours * BLOCK))
    other = chain_of(*range(same * BLOCK), *range(5000, 5000 + theirs * BLOCK))
    assert shared_blocks(one, other) == same
    assert shared_blocks(one, one) == len(one)
    anchor = 1 << same.bit_length() - 1 if same else 0
    assert shared_blocks(one, other, anchor) == same


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=1, max_size=20), st.integers(1, 12))
def test_a_promise_is_never_longer_than_what_is_computed_and_never_half_as_long_as_it_could_be(
    chains: list[tuple[int, int]], asked: int
) -> None:
    promises, wanted = Promises(), chain_of(*range(asked * BLOCK))
    for tag, (same, rest) in enumerate(chains):
        tokens = [*range(same * BLOCK), *range(1000 * (tag + 1), 1000 * (tag + 1) + rest * BLOCK)]
        promises.add(ticket(tag, chain=chain_of(*tokens)))
    found = promises.find(wanted, BLOCK)
    best = max(min(same, asked) for same, _ in chains)
    promised = found["a"] // BLOCK if found else 0
    assert promised <= best
    assert 2 * promised >= best


def test_popularity_rises_with_requests_and_fades_with_time() -> None:
    popularity, keys = Popularity(1000), chain_of(*range(64))
    for place in range(40):
        popularity.note(keys, place * 0.5)
    rate = popularity.rate(keys, 16, 20.0)
    assert 1.0 < rate < 2.0  # two a second, and the count has not run for long
    assert popularity.rate(keys, 16, 20.0 + 5 * FADE_SECONDS) < 0.02
    assert popularity.rate(chain_of(*range(9, 64)), 13, 20.0) == 0.0


def test_the_popularity_of_a_prefix_counts_all_that_begin_with_it() -> None:
    popularity = Popularity(1000)
    for place in range(100):
        popularity.note(chain_of(*range(32), *range(1000 * place, 1000 * place + 32)), 0.0)
    keys = chain_of(*range(32), *range(7, 39))
    assert popularity.rate(keys, 8, 0.0) == pytest.approx(100 / FADE_SECONDS)
    assert popularity.rate(keys, 16, 0.0) == pytest.approx(100 / FADE_SECONDS)


@pytest.mark.parametrize(
    ("held", "since", "formerly", "lately"),
    [(0, 5.0, 11, 11), (7, 5.0, 11, 11), (8, 5.0, 0, 0), (16, 5.0, 0, 0), (0, 6.0, 11, 0), (3, float("-inf"), 11, 11)],
)
def test_what_was_asked_for_before_is_known_to_about_its_length(held: int, since: float, formerly: int, lately: int) -> None:
    popularity = Popularity(1000)
    prefix = range(10 * BLOCK)
    popularity.note(chain_of(*prefix, *range(1000, 1000 + 10 * BLOCK)), 5.0)
    asked = chain_of(*prefix, *range(5000, 5000 + 7 * BLOCK))
    assert popularity.note(asked, 6.0, held, since) == (formerly, lately, 5.0 if formerly else inf)


def test_popularity_keeps_a_bounded_number_of_prefixes() -> None:
    popularity = Popularity(10)
    for place in range(100):
        popularity.note(chain_of(*range(1000 * place, 1000 * place + 32)), 0.0)
    assert len(popularity._counts) == 10
    assert np.isfinite(popularity.rate(chain_of(*range(99_000, 99_032)), 8, 0.0))
