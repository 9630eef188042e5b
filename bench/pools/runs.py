"""Plays arms of bench.pools over engines that are serving."""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.child_process import Started
from bench.engines import Engines
from bench.field.flags import NUMBERED
from bench.field.front_door import wait_until_peerkv_serves, wait_until_router_serves
from bench.machine import StartFailed, free_ports
from bench.open_loop import Player, Sample
from bench.pools import reach
from bench.pools.arms import PoolArm, command
from bench.pools.flags import Numbers
from bench.pools.rate_search import RateSearch
from bench.pools.report import PoolRun, Step
from bench.pools.sources import pool_tokens, sources_of
from bench.pools.workload import Lengths, SharedPrefixes, prefixes_of
from bench.workloads import Talk
from gateway.cli.bench.spread import quantile
from gateway.cli.bench.words import COMMON, Words
from transport.table.directory import TableDirectory
from transport.table.reader import TableReader
from transport.table.tiers import is_tier

MODEL = "pools"
COLD_PROMPTS = 4


class RunFailed(Exception):
    """A run does not count; the message says why."""


class Pools:
    """Knows the workload that fits these engines. `where` is the file that tells them how far they reach.

    Raises StartFailed if a replica has no host memory, RunFailed if a request fails.
    """

    def __init__(self, given: argparse.Namespace, engines: Engines, where: Path, directory: Path) -> None:
        self._given, self._engines, self._where, self._directory = given, engines, where, directory
        self._numbers: Numbers = given.numbers
        self._lengths = Lengths(self._numbers.prefix_tokens, self._numbers.suffix_tokens, self._numbers.answer_tokens)
        self._tables = _opened(engines.table_dir, self._numbers.replicas)
        self.pool_tokens = pool_tokens(self._tables)
        self.prefixes = prefixes_of(self.pool_tokens, given.pool_share, self._numbers.prefix_tokens)
        self.cold_seconds = self._cold_seconds()
        self.bound = given.bound or given.cold_factor * self.cold_seconds

    def run(self, arm: PoolArm, turn: int) -> PoolRun:
        """Empty all memories, fill them, find the rate at the bound. Raises StartFailed, RunFailed, httpx.HTTPError."""
        reach.write(self._where, arm.reach)
        numbers = self._numbers
        shape = random.Random(f"{self._given.seed} {turn}")
        words = self._words(f"{self._given.seed} {turn} {arm.name} {time.time_ns()}")
        asked = SharedPrefixes(self.prefixes, self._given.zipf, self._lengths, words)
        search = RateSearch(numbers.rate, self._given.growth, self.bound, numbers.steps)
        steps: list[Step] = []
        with self._front_door(arm, turn) as url:
            self._engines.forget()
            self._play(url, asked.fill(numbers.passes, 2 * numbers.replicas, shape))
            counts, sources = self._engines.counts(), sources_of(self._tables)
            while (rate := search.next_rate()) is not None:
                chance = random.Random(f"{self._given.seed} {turn} {rate:.6f}")
                steps.append(_step(rate, *self._play(url, asked.step(rate, numbers.seconds, chance))))
                search.note(rate, steps[-1].p90)
            counts, sources = self._engines.counts().since(counts), sources_of(self._tables).since(sources)
        if wrong := sources.out_of_reach(arm.reach):
            raise RunFailed(f"{wrong} tokens came from where nothing should come from: {sources}")
        found = search.found()
        return PoolRun(arm.name, turn, tuple(steps), counts, sources, found.rate, found.sure)

    @contextmanager
    def _front_door(self, arm: PoolArm, turn: int) -> Iterator[str]:
        """Yield the address of what leads requests to the replicas; it ends afterwards."""
        (port,) = free_ports(1)
        url = f"http://127.0.0.1:{port}"
        argv, env = command(arm, self._engines, port)
        process = Started(argv, self._directory / f"{turn}-{arm.name.replace(' ', '-').replace(',', '')}.log", env)
        try:
            if arm.steered:
                wait_until_peerkv_serves(process, url, self._numbers.replicas)
            else:
                wait_until_router_serves(process, url, MODEL, {})
            yield url
        finally:
            process.end()

    def _cold_seconds(self) -> float:
        """Return how long the first token of a prompt that nobody has takes on an idle fleet: the median of a few."""
        reach.write(self._where, reach.Reach.NOTHING)
        alone = SharedPrefixes(COLD_PROMPTS, 0.0, self._lengths, self._words(f"cold {time.time_ns()}"))
        samples = self._play(self._engines.urls[0], alone.fill(1, 1, random.Random(0)))[0]
        return statistics.median(sample.first_seconds for sample in samples[1:])  # the first one finds an engine unused

    def _play(self, url: str, talks: Sequence[Talk]) -> tuple[list[Sample], float]:
        player = Player(url, MODEL, {})
        wall = asyncio.run(player.play(talks))
        if wrong := [sample.error for sample in player.samples if sample.error]:
            raise RunFailed(f"{len(wrong)} of {len(player.samples)} requests failed, the first: {wrong[0]}")
        return player.samples, wall

    def _words(self, seed: str) -> Words:
        return Words(random.Random(seed), NUMBERED if self._given.numbered else COMMON)


def _opened(table_dir: Path, replicas: int) -> dict[str, TableReader]:
    tables = dict(TableDirectory(table_dir).tables())
    if sum(map(is_tier, tables)) != replicas:
        raise StartFailed(f"{replicas} replicas should have host memory; there are: {', '.join(sorted(tables))}")
    return tables


def _step(rate: float, samples: Sequence[Sample], wall: float) -> Step:
    firsts = [sample.first_seconds for sample in samples]
    return Step(rate, len(samples), quantile(firsts, 0.5), quantile(firsts, 0.9), len(samples) / wall)
