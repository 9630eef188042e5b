"""Made-up workloads, and what peerkv makes of them where caches are too small for all prefixes."""

from collections import Counter
from dataclasses import replace

import pytest

from bench.simulate.profiles import CPU_SMOLLM2, H200_LLAMA_8B, Profile
from bench.simulate.runs import build_policy
from bench.simulate.simulation import Fleet, Simulation
from bench.simulate.summary import Setting, Summary, summarize
from bench.simulate.traces import scaled
from bench.simulate.workloads import CPU_SHAPE, GPU_SHAPE, TURNS, WORKLOADS, WorkloadShape, shape_for, workload

CPU = replace(CPU_SMOLLM2, engine=replace(CPU_SMOLLM2.engine, kv_blocks=128))
GPU = replace(H200_LLAMA_8B, engine=replace(H200_LLAMA_8B.engine, kv_blocks=16384))
SEEDS = range(6)


def played(name: str, profile: Profile, policy: str, rate: float, seed: int) -> Summary:
    trace = scaled(workload(name, shape_for(profile), 300, seed), rate=rate, seed=seed)
    fleet = Fleet(profile, 2, trace.block_tokens)
    run = Simulation(trace, fleet, build_policy(policy, fleet, seed)).run()
    return summarize(run, Setting(name, profile.name, policy, 2, rate, 1, seed))


def sums(name: str, profile: Profile, policy: str, rate: float) -> tuple[int, float]:
    """Prompt tokens computed, and the sum of the mean times to first token."""
    runs = [played(name, profile, policy, rate, seed) for seed in SEEDS]
    return sum(run.computed_tokens for run in runs), sum(run.ttft_mean for run in runs)


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("shape", [CPU_SHAPE, GPU_SHAPE])
def test_a_workload_is_the_same_for_a_seed_and_comes_once_a_second(name: str, shape: WorkloadShape) -> None:
    trace = workload(name, shape, 400, 1)
    assert trace == workload(name, shape, 400, 1)
    assert len(trace.requests) == 400
    assert 300 < trace.seconds < 550
    for request in trace.requests:
        assert len(request.blocks) == -(-request.prompt_tokens // trace.block_tokens)


def test_the_sizes_follow_the_engines() -> None:
    assert (shape_for(CPU), shape_for(GPU)) == (CPU_SHAPE, GPU_SHAPE)


def test_shared_prefixes_are_more_than_one_cache_holds_and_less_than_two() -> None:
    firsts = Counter(request.blocks[0] for request in workload("shared", CPU_SHAPE, 400, 1).requests)
    assert CPU_SHAPE.cache_tokens < len(firsts) * CPU_SHAPE.prefix_tokens < 2 * CPU_SHAPE.cache_tokens


def test_the_hot_prefix_begins_most_prompts_and_turns_repeat_what_was_said() -> None:
    hot = Counter(request.blocks[0] for request in workload("hot", CPU_SHAPE, 400, 1).requests)
    assert 200 < hot.most_common(1)[0][1] < 280
    talks = Counter(request.blocks[0] for request in workload("conversations", CPU_SHAPE, 400, 1).requests)
    assert set(talks.values()) == {TURNS}


@pytest.mark.parametrize("rate", [1.0, 1.5, 3.0])
def test_with_imports_no_more_is_computed_than_without_where_caches_are_too_small(rate: float) -> None:
    """Copies without a price computed 20 to 40 % more here, and came later in the mean."""
    with_imports, without = sums("shared", CPU, "peerkv", rate), sums("shared", CPU, "peerkv-no-imports", rate)
    assert with_imports[0] <= 1.03 * without[0]
    assert with_imports[1] <= without[1]


@pytest.mark.parametrize(
    ("name", "profile", "rate"),
    [("hot", CPU, 4.0), ("conversations", CPU, 4.0), ("conversations", GPU, 6.0), ("shared", GPU, 6.0)],
)
def test_imports_still_bring_the_first_token_sooner(name: str, profile: Profile, rate: float) -> None:
    assert sums(name, profile, "peerkv", rate)[1] < sums(name, profile, "peerkv-no-imports", rate)[1]


def test_peerkv_is_sooner_than_sticky_routing_and_the_tree_where_caches_are_too_small() -> None:
    ours = sums("shared", CPU, "peerkv", 2.0)
    for other in ("sticky-hash", "tree"):
        assert ours[1] < sums("shared", CPU, other, 2.0)[1]
