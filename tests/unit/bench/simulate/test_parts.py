"""The simulator's parts alone: caches, tables, links, traces, profiles, the chart."""

import json
import random
from collections import Counter, OrderedDict
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.simulate.links import Copy, Links
from bench.simulate.prefix_cache import PrefixCache
from bench.simulate.profiles import H200_LLAMA_8B, LinkProfile, ProfileRefused, adjusted, read_profile
from bench.simulate.published import PublishedBlocks
from bench.simulate.traces import Conversations, TraceRefused, made_up, read_mooncake, scaled
from gateway.cli.plot import line_chart

# The cache


def test_the_least_recently_used_block_goes_first() -> None:
    gone: list[int] = []
    cache = PrefixCache(48, gone.append)
    for block in (1, 2, 3):
        assert cache.reserve(16)
        cache.share(block, 16)
    cache.release((1, 2, 3))
    cache.use((3,))
    cache.release((3,))
    assert cache.reserve(32)
    assert gone == [2, 1]  # a chain's tail before its head, and 3 was used since
    assert 3 in cache


def test_blocks_in_use_are_never_given_up() -> None:
    cache = PrefixCache(32, lambda block: None)
    assert cache.reserve(32)
    cache.share(1, 16)
    assert not cache.reserve(16)
    assert cache.match((1,)) == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_a_cache_never_exceeds_its_capacity_and_counts_what_it_holds(seed: int) -> None:
    chance = random.Random(seed)
    gone: list[int] = []
    cache = PrefixCache(640, gone.append)
    running: list[tuple[tuple[int, ...], int]] = []
    for _ in range(200):
        if running and chance.random() < 0.5:
            blocks, private = running.pop(chance.randrange(len(running)))
            cache.release(blocks)
            cache.unreserve(private)
        else:
            chain = tuple(range(base := 100 * chance.randrange(6), base + chance.randint(1, 5)))
            held = cache.match(chain)
            cache.use(chain[:held])
            private = chance.randrange(40)
            if cache.reserve(16 * (len(chain) - held) + private):
                for block in chain[held:]:
                    cache.share(block, 16)
                running.append((chain, private))
            else:
                cache.release(chain[:held])
        assert 0 <= cache.used_tokens <= 640
        assert cache.private_tokens == sum(private for _, private in running)
        assert cache.room_tokens == 640 - cache.private_tokens - 16 * len({b for chain, _ in running for b in chain})


# The tables


def test_tables_tell_how_much_of_a_chain_each_replica_holds() -> None:
    published = PublishedBlocks(70)
    published.publish(0, (1, 2, 3))
    published.publish(69, (1, 2))
    published.publish(5, (2, 3))
    assert published.runs((1, 2, 3, 4)).tolist() == [3, *[0] * 68, 2]
    published.withdraw(0, 2)
    assert published.runs((1, 2, 3)).tolist() == [1, *[0] * 68, 2]
    assert published.run(69, (1, 2, 3)) == 2
    assert published.runs(()).tolist() == [0] * 70


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_runs_are_those_of_each_replica_alone(seed: int) -> None:
    chance = random.Random(seed)
    published = PublishedBlocks(11)
    for replica in range(11):
        published.publish(replica, [block for block in range(8) if chance.random() < 0.8])
    for _ in range(10):
        published.withdraw(chance.randrange(11), chance.randrange(8))
    chain = tuple(range(chance.randint(0, 8)))
    assert published.runs(chain).tolist() == [published.run(replica, chain) for replica in range(11)]


# The links


def test_a_copy_alone_takes_its_bytes_over_the_bandwidth() -> None:
    links = Links(LinkProfile(within_host_bytes_second=100.0))
    (copy,) = links.start(Copy(0, 1, 500, 7), 2.0)
    assert copy.due == pytest.approx(7.0)
    assert links.end(copy, 7.0) == []
    assert (links.moved.within_host, links.moved.across_hosts) == (500, 0)


def test_copies_from_one_owner_share_its_link_and_get_it_back() -> None:
    links = Links(LinkProfile(within_host_bytes_second=100.0))
    first, second = Copy(0, 1, 500, 1), Copy(0, 2, 500, 2)
    links.start(first, 0.0)
    links.start(second, 1.0)  # the first has 400 left, at half the speed from now on
    assert first.due == pytest.approx(9.0)
    assert second.due == pytest.approx(11.0)
    links.end(first, 9.0)
    assert second.due == pytest.approx(10.0)


def test_copies_between_different_pairs_do_not_share() -> None:
    links = Links(LinkProfile(within_host_bytes_second=100.0))
    first, second = Copy(0, 1, 500, 1), Copy(2, 3, 500, 2)
    links.start(first, 0.0)
    links.start(second, 0.0)
    assert (first.due, second.due) == (pytest.approx(5.0), pytest.approx(5.0))


def test_hosts_are_told_apart_and_their_bytes_are_counted_apart() -> None:
    links = Links(LinkProfile(replicas_each_host=8, across_hosts_bytes_second=10.0))
    assert not links.across_hosts(0, 7)
    assert links.across_hosts(7, 8)
    copy = Copy(0, 8, 100, 1, across_hosts=True)
    links.start(copy, 0.0)
    assert copy.due == pytest.approx(10.0)
    links.end(copy, 10.0)
    assert links.moved.across_hosts == 100


# Traces


def _write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _row(timestamp: int, tokens: int, *blocks: int) -> dict[str, object]:
    return {"timestamp": timestamp, "input_length": tokens, "output_length": 5, "hash_ids": list(blocks)}


def test_a_mooncake_trace_is_read(tmp_path: Path) -> None:
    trace = read_mooncake(_write(tmp_path / "t.jsonl", _row(0, 600, 0, 1), _row(3000, 1024, 0, 2)))
    assert [request.arrival for request in trace.requests] == [0.0, 3.0]
    assert trace.requests[1].blocks == (0, 2)
    assert trace.prompt_tokens == 1624
    assert [r.blocks for r in read_mooncake(tmp_path / "t.jsonl", requests_max=1).requests] == [(0, 1)]


@pytest.mark.parametrize(
    "row", [{"timestamp": 0}, _row(0, 600, 1), _row(0, 0), _row(-1, 100, 1), [], _row(0, 1, 1) | {"timestamp": "x"}]
)
def test_a_row_that_makes_no_sense_is_refused_with_its_line(tmp_path: Path, row: object) -> None:
    with pytest.raises(TraceRefused, match=r"t\.jsonl:2"):
        read_mooncake(_write(tmp_path / "t.jsonl", _row(0, 600, 0, 1), row))


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceRefused, match="absent"):
        read_mooncake(tmp_path / "absent")
    (tmp_path / "empty").write_text("")
    with pytest.raises(TraceRefused, match="no requests"):
        read_mooncake(tmp_path / "empty")


def test_requests_of_one_timestamp_are_spread_until_the_next(tmp_path: Path) -> None:
    rows = [_row(1000 * (number // 50) * 3, 100, number) for number in range(150)]
    trace = scaled(read_mooncake(_write(tmp_path / "t.jsonl", *rows)), rate=2.0)
    first = [request.arrival for request in trace.requests if request.blocks[0] < 50]
    assert 0.0 < min(first) < 0.2
    assert 1.3 < max(first) < 1.5
    assert len(set(first)) == 50
    assert trace.seconds == 3.0


def test_a_copy_has_its_own_blocks_except_the_system_prompt() -> None:
    original = made_up(Conversations(conversations=30), 1)
    trace = scaled(original, copies=3, seed=5)
    counts = Counter(block for request in trace.requests for block in request.blocks)
    assert len(trace.requests) == 3 * len(original.requests)
    assert counts[0] == len(trace.requests)
    own = Counter(block for request in original.requests for block in request.blocks)
    assert sorted(counts.values()) == sorted([3 * own[0], *(count for block, count in own.items() if block for _ in range(3))])


def test_the_same_seed_gives_the_same_trace_and_another_one_another() -> None:
    shape = Conversations(conversations=20)
    assert made_up(shape, 3) == made_up(shape, 3)
    assert made_up(shape, 3) != made_up(shape, 4)
    trace = made_up(shape, 3)
    assert scaled(trace, copies=2, seed=1) == scaled(trace, copies=2, seed=1)
    assert scaled(trace, copies=2, seed=1) != scaled(trace, copies=2, seed=2)


def test_a_later_turn_begins_with_the_former_one_and_has_its_session() -> None:
    trace = made_up(Conversations(conversations=30, turns=4), 9)
    sessions: dict[int, list[tuple[int, ...]]] = {}
    for request in trace.requests:
        sessions.setdefault(request.session, []).append(request.blocks)
    assert len(sessions) == 30
    for turns in sessions.values():
        assert len(turns) == 4
        for former, later in pairwise(turns):
            assert later[: len(former) - 1] == former[:-1]


def test_a_trace_can_not_be_scaled_to_nothing() -> None:
    with pytest.raises(ValueError, match="positive"):
        scaled(made_up(Conversations(conversations=1), 0), rate=0.0)


# Profiles and the chart


def test_a_profile_is_changed_field_by_field(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"engine": {"kv_blocks": 5}, "links": {"replicas_each_host": 4}}))
    profile = read_profile("h200-llama-8b", path)
    assert (profile.engine.kv_tokens, profile.links.replicas_each_host) == (80, 4)
    assert profile.engine.prefill_seconds_token == H200_LLAMA_8B.engine.prefill_seconds_token


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"engine": {"speed": 1}}, "speed"), ({"motor": {}}, "motor"), ({"engine": {"kv_blocks": "many"}}, "kv_blocks")],
)
def test_a_profile_that_makes_no_sense_is_refused_by_name(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ProfileRefused, match=said):
        adjusted(H200_LLAMA_8B, changes)


def test_an_unreadable_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileRefused, match="no profile"):
        read_profile("h300", None)
    (tmp_path / "p.json").write_text("[]")
    with pytest.raises(ProfileRefused, match="not a JSON object"):
        read_profile("h200-llama-8b", tmp_path / "p.json")
    with pytest.raises(ProfileRefused, match="absent"):
        read_profile("h200-llama-8b", tmp_path / "absent")


def test_a_chart_has_a_line_for_each_policy() -> None:
    svg = line_chart("a < b", "rate", "seconds", OrderedDict(tree=[(1.0, 0.2), (2.0, 30.0)], peerkv=[(1.0, 0.1), (2.0, 0.5)]))
    assert svg.count("<polyline") == 2
    assert "a &lt; b" in svg
    assert ">100<" in svg
    with pytest.raises(ValueError, match="positive"):
        line_chart("", "", "", {"tree": [(1.0, 0.0)]})
