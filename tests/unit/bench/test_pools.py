"""The parts of bench.pools that can be wrong without anybody noticing: reach, the search for a rate, sources, ratios."""

import importlib
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bench.engines import Counts
from bench.pools.arms import USUAL
from bench.pools.flags import CPU, GPU, parse
from bench.pools.rate_search import Found, RateSearch
from bench.pools.reach import VARIABLE, Reach, read, write
from bench.pools.report import PoolRun, Step, as_json, from_json, markdown
from bench.pools.sources import Sources
from bench.pools.workload import Lengths, SharedPrefixes, prefixes_of
from engine.connector.import_sources import Peers
from gateway.cli.bench.words import Words
from transport.table.deliveries import DeliveryReason
from transport.table.tiers import host_memory_of

OWN = host_memory_of("replica-0")
OTHER = host_memory_of("replica-1")
LENGTHS = Lengths(prefix_tokens=40, suffix_tokens=8, answer_tokens=4)
ABOUT = {"date": "d", "processor": "p", "gpus": "", "versions": "v", "command": "c", "workload": "w", "load_average": [1.0]}


@pytest.mark.parametrize(
    ("reach", "allowed"),
    [(Reach.POOL, {OWN, OTHER, "replica-1"}), (Reach.CACHES, {OWN, "replica-1"}), (Reach.NOTHING, {OWN})],
)
def test_a_replica_reaches_its_own_region_and_what_its_arm_allows(reach: Reach, allowed: set[str]) -> None:
    assert {source for source in (OWN, OTHER, "replica-1") if reach.allows(source, OWN)} == allowed


class Reader:
    def __init__(self, name: str) -> None:
        self.name = name


def test_the_connector_of_the_bench_looks_only_where_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = tmp_path / "reach"
    monkeypatch.setenv(VARIABLE, str(where))
    readers = [Reader(name) for name in (OWN, OTHER, "replica-1")]
    monkeypatch.setattr(Peers, "_find", lambda self, tables, source: (readers, DeliveryReason.NONE))
    monkeypatch.setattr(Peers, "_who_go_on", lambda self, tables, keys, begin: readers)
    monkeypatch.setattr(Peers, "stored_elsewhere", lambda self, keys: np.ones(len(keys), np.bool_))
    monkeypatch.setitem(sys.modules, "engine.connector.peerkv_connector", type(sys)("stub"))
    sys.modules["engine.connector.peerkv_connector"].PeerKVConnector = object  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "bench.pools.connector", raising=False)
    importlib.import_module("bench.pools.connector")
    peers = Peers.__new__(Peers)
    peers._own_tier = OWN
    found = {}
    for reach in Reach:
        write(where, reach)
        assert read(where) is reach
        within = [reader.name for reader in peers._find({}, None)[0]]
        assert [reader.name for reader in peers._who_go_on({}, np.zeros((3, 2), np.uint64), 4)] == within
        found[reach] = (within, int(peers.stored_elsewhere(np.zeros((3, 2), np.uint64)).sum()))
    assert found == {
        Reach.POOL: ([OWN, OTHER, "replica-1"], 3),
        Reach.CACHES: ([OWN, "replica-1"], 0),
        Reach.NOTHING: ([OWN], 0),
    }


def test_what_came_from_out_of_reach_is_counted_for_each_arm() -> None:
    had = Sources(own_region=1, other_regions=20, caches=300)
    assert [had.out_of_reach(reach) for reach in (Reach.POOL, Reach.CACHES, Reach.NOTHING)] == [0, 20, 320]
    assert had.since(Sources(1, 10, 100)) == Sources(0, 10, 200)


SERVER = "import sys; from bench.pools.server import OURS; print(OURS)"


def test_the_launcher_finds_our_connector_in_what_the_supervisor_writes(tmp_path: Path) -> None:
    from engine.replicas.launch import EngineSettings, server_args

    told = subprocess.run([sys.executable, "-c", SERVER], capture_output=True, text=True, check=True).stdout.strip()
    assert any(told in arg for arg in server_args(EngineSettings("m", tmp_path, tmp_path, tmp_path), "replica-0", "s"))


def searched(search: RateSearch, seconds_at: "dict[float, float]") -> Found:
    while (rate := search.next_rate()) is not None:
        search.note(rate, seconds_at[round(rate, 3)])
    return search.found()


def test_rates_go_up_until_the_bound_is_crossed_and_the_rate_at_it_lies_between() -> None:
    search = RateSearch(1.0, 2.0, bound=1.0, steps_max=6)
    found = searched(search, {1.0: 0.2, 2.0: 0.5, 4.0: 2.0})
    assert list(search.tried) == [1.0, 2.0, 4.0]
    assert found.sure == "between"
    assert found.rate == pytest.approx(2 * 2**0.5)


def test_rates_go_down_where_the_first_is_too_much() -> None:
    search = RateSearch(4.0, 2.0, bound=1.0, steps_max=6)
    found = searched(search, {4.0: 9.0, 2.0: 1.5, 1.0: 0.5})
    assert list(search.tried) == [4.0, 2.0, 1.0]
    assert 1.0 < found.rate < 2.0


def test_a_search_that_ends_before_the_bound_says_which_side_it_saw() -> None:
    up = RateSearch(1.0, 2.0, bound=1.0, steps_max=2)
    assert searched(up, {1.0: 0.1, 2.0: 0.2}) == Found(2.0, "at least")
    down = RateSearch(1.0, 2.0, bound=1.0, steps_max=2)
    assert searched(down, {1.0: 3.0, 0.5: 2.0}) == Found(0.5, "at most")


def prefixes(words_seed: int) -> SharedPrefixes:
    return SharedPrefixes(10, 1.0, LENGTHS, Words(random.Random(words_seed)))


def head(text: str) -> str:
    return " ".join(text.split()[: LENGTHS.prefix_tokens])


def test_each_prefix_is_asked_for_in_each_pass_with_a_new_question() -> None:
    talks = prefixes(1).fill(3, 4, random.Random(1))
    turns = [turn.text for talk in talks for turn in talk.turns]
    assert len(talks) == 4
    assert set(Counter(map(head, turns)).values()) == {3}
    assert len(set(turns)) == 30


def test_a_step_has_its_number_of_requests_and_uneven_prefixes_that_are_the_same_in_other_words() -> None:
    one, other = (prefixes(seed).step(5.0, 100.0, random.Random(3)) for seed in (1, 2))
    assert len(one) == 500
    assert [talk.at for talk in one] == [talk.at for talk in other] == sorted(talk.at for talk in one)
    assert 0 <= one[0].at < one[-1].at <= 100.0
    uses = Counter(head(talk.turns[0].text) for talk in one).most_common()
    assert len(uses) == 10
    assert uses[0][1] > 5 * uses[-1][1]
    assert [count for _, count in uses] == [
        count for _, count in Counter(head(talk.turns[0].text) for talk in other).most_common()
    ]
    assert not {name for name, _ in uses} & {head(talk.turns[0].text) for talk in other}


def test_the_prefixes_are_more_than_a_private_pool_holds() -> None:
    for numbers in (CPU, GPU):
        pool = 50 * numbers.replicas * numbers.prefix_tokens
        assert 50 < prefixes_of(pool, parse(["--model", "m"]).pool_share, numbers.prefix_tokens) <= 50 * numbers.replicas


def run(arm: str, turn: int, rate: float, sure: str = "between") -> PoolRun:
    steps = (Step(rate, 10, 0.1, 0.2, rate),)
    return PoolRun(arm, turn, steps, Counts(computed=25, local=25), Sources(50, 0, 0), rate, sure)  # type: ignore[arg-type]


def row(runs: list[PoolRun], arm: str) -> list[str]:
    lines = markdown(runs, "shared pool", ABOUT).splitlines()
    return [cell.strip() for cell in next(line for line in lines if line.startswith(f"| {arm} |")).split("|")[2:-1]]


def test_ratios_are_taken_within_a_round_and_shares_are_of_all_prompt_tokens() -> None:
    runs = [run("shared pool", 0, 2.0), run("private pools", 0, 1.0), run("private pools", 1, 1.0), run("shared pool", 1, 4.0)]
    assert row(runs, "private pools")[:4] == ["1.00 (1.00 to 1.00)", "3.00 (2.00 to 4.00)", "25 %", "25 %"]
    assert row(runs, "private pools")[4] == "50 %"
    assert row(runs, "shared pool")[1] == ""


def test_where_a_rate_is_only_a_bound_the_ratio_is_one_too() -> None:
    shared = run("shared pool", 0, 4.0, "at least")
    assert row([shared, run("private pools", 0, 2.0)], "private pools")[1] == "≥ 2.00 (2.00 to 2.00)"
    assert row([shared, run("private pools", 0, 2.0, "at most")], "private pools")[1] == "≥ 2.00 (2.00 to 2.00)"
    assert row([shared, run("private pools", 0, 2.0, "at least")], "private pools")[1] == "-"


def test_what_was_written_as_json_is_read_again() -> None:
    runs = [run("shared pool", 0, 2.0), run("private pools", 0, 1.0, "at most")]
    assert from_json(json.loads(json.dumps(as_json(runs, ["a failure"], ABOUT)))) == (runs, ABOUT)


def test_flags_fit_the_kind_of_engine_and_can_be_overridden() -> None:
    given = parse(["--engines", "gpu", "--replicas", "2", "--arms", "private pools; shared pool"])
    assert (given.numbers.replicas, given.numbers.prefix_tokens, given.numbered) == (2, GPU.prefix_tokens, True)
    assert [arm.name for arm in given.arms] == ["private pools", "shared pool"]
    assert "dummy" in given.vllm_args
    assert parse(["--model", "m"]).arms == list(USUAL)
    with pytest.raises(SystemExit):
        parse(["--arms", "no such"])
