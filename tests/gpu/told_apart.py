"""Checks with weights whose answers tell contexts apart: two holders, salts, blocks that change, preemption."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.gpu.replica import Answer, Replica, prompt
from tests.real.families.engines import moving_on, supplied
from tests.tiny_models import WORDS_END
from transport.groups import step
from transport.table.reader import TableReader

if TYPE_CHECKING:
    from tests.gpu.families import Run

TRIES_MAX = 25
SHORTFALL = 0.1
"""A token whose log-probability is less than this below the best one's may take its place in another batch."""


class Engines:
    """An owner `a`, an importer `b` and another holder `c` of one tiny model."""

    def __init__(self, run: Run, family: str) -> None:
        self.run = run
        self.family = family
        self._model, self._arguments = run.telling(family, 4096)
        self.seconds = 240.0 if run.given.dry else 60.0
        self._open = ExitStack()
        self._engines: dict[str, Replica] = {}
        self._tables: dict[str, TableReader] = {}

    def __enter__(self) -> Engines:
        try:
            for name in ("a", "b", "c"):
                self.start(name)
            self.block = step(self.table("a").groups)
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def start(self, name: str, **arguments: Any) -> Replica:
        """Start an engine and wait for it."""
        engine = self._engines[name] = self.run.engine(name, self._model, **(self._arguments | arguments))
        self._open.callback(engine.kill)
        engine.ready(200)
        self._tables[name] = self._open.enter_context(closing(self.run.table(name)))
        return engine

    def __getitem__(self, name: str) -> Replica:
        return self._engines[name]

    def table(self, name: str) -> TableReader:
        return self._tables[name]

    def ask(self, name: str, ids: list[int], **how: Any) -> Answer:
        return self._engines[name].ask(ids, 8, logprobs=True, seconds=self.seconds, **how)

    def prompt(self, blocks: int, seed: int) -> list[int]:
        """So many whole blocks and nine tokens."""
        return prompt(blocks * self.block + 9, seed, WORDS_END)

    def check(self, what: str, passed: bool, **values: Any) -> None:
        self.run.check(f"{self.family}: {what}", passed, **values)

    @contextlib.contextmanager
    def counting(self, name: str) -> Iterator[dict[str, int]]:
        """What an engine counts inside the block, `from_peer` the sum of imported tokens; filled in at its end."""
        before, counted = self.table(name).counters(), dict[str, int]()
        yield counted
        counted |= {counter: value - before[counter] for counter, value in self.table(name).counters().items()}
        counted["from_peer"] = sum(value for counter, value in counted.items() if counter.startswith("peer_tokens"))


def told_apart(run: Run, family: str) -> None:
    """All checks of this module on a fresh set of engines."""
    with Engines(run, family) as engines:
        two_holders(engines)
        salts(engines)
        changed_blocks(engines)
        preempted(engines)


def two_holders(engines: Engines) -> None:
    """The one that holds more of a prompt supplies it."""
    ids = engines.prompt(5, 2000)
    engines.ask("a", ids[: 2 * engines.block + 3])
    engines.ask("c", ids, source="")
    with engines.counting("b") as counted:
        imported = engines.ask("b", ids)
    same = imported.same_as(engines.ask("c", ids))
    fine = same and counted["from_peer"] == 5 * engines.block
    engines.check("of two holders the longer one supplies", fine, bits_equal=same, from_peer=counted["from_peer"])


def salts(engines: Engines) -> None:
    """What was computed under one salt is a miss under another and under none."""
    ids, whole = engines.prompt(2, 3000), 2 * engines.block
    cold = engines.ask("a", ids, cache_salt="one", source="")
    with engines.counting("b") as counted:
        other = engines.ask("b", ids, cache_salt="two", source="a")
        none = engines.ask("b", ids, source="a")
        own = engines.ask("b", ids, cache_salt="one", source="a")
    cached = (other.cached, none.cached, own.cached)
    same = other.tokens == none.tokens == own.tokens == cold.tokens
    fine = same and cached == (0, 0, whole) and counted["from_peer"] == whole
    engines.check("another salt is another cache", fine, tokens_equal=same, cached=cached, from_peer=counted["from_peer"])


def changed_blocks(engines: Engines) -> None:
    """The last block of each group moves on while it is copied: not believed, computed, and the answer is right."""
    ids = engines.prompt(3, 4000)
    engines.ask("a", ids, source="")
    wanted = engines.ask("a", ids, source="")
    table = engines.table("a")
    found = supplied(table, ids)
    ends = [sum(found.counts[: number + 1]) for number in range(len(found.counts))]
    for group, end in enumerate(ends):
        refused, right, tries = False, True, 0
        while not refused and tries < TRIES_MAX:  # it may stand still for as long as a copy takes
            tries += 1
            engines["b"].clear()
            path = Path(engines.run.tables / "a.table")
            with engines.counting("b") as counted, moving_on(table, path, int(found.block_ids[end - 1])):
                answer = engines.ask("b", ids, source="a")
            right &= answer.tokens == wanted.tokens and counted["computed_tokens"] == len(ids) - answer.cached
            refused = answer.cached < 3 * engines.block
        kind = table.groups[group].kind
        engines.check(
            f"a block of group {group} ({kind}) that changes is computed", refused and right, right=right, tries=tries
        )
    engines["b"].clear()
    same = engines.ask("b", ids, source="a").same_as(wanted)
    engines.check("what no longer changes is imported", same, bits_equal=same)


def preempted(engines: Engines) -> None:
    """Six prompts, of which another engine has the beginnings, in an engine with room for two.

    What is computed again is computed in other batches, so answers may differ where tokens are almost as good: an engine with
    all the room reads each answer once more, and its tokens must be nearly the best ones about as often as without preemption.
    """
    block = engines.block
    prompts = [engines.prompt(2, 5000 + number) for number in range(6)]
    for ids in prompts:
        engines.ask("a", ids, source="")
    wanted = engines["c"].ask_all(prompts, 2 * block, engines.seconds)
    table = engines.table("c")
    (memory,) = table.memories
    size = max(layer.stride for layer in memory.layers)
    layers = max(sum(layer.group == group for layer in memory.layers) for group in range(len(table.groups)))
    space = (1 + len(table.groups) * 10) * size * layers
    small = engines.start("small", kv_cache_memory_bytes=space, max_model_len=5 * block)
    with engines.counting("small") as counted:
        answers = small.ask_all(prompts, 2 * block, engines.seconds)
    small.kill()
    preemptions = sum(answer.preempted for answer in answers)
    ours, theirs = (
        max(_worse(engines, ids, answer) for ids, answer in zip(prompts, given, strict=True)) for given in (answers, wanted)
    )
    fine = preemptions > 0 and counted["imports"] > 0 and ours <= theirs + 0.05
    engines.check(
        "preempted requests are right",
        fine,
        preemptions=preemptions,
        imports=counted["imports"],
        worse=ours,
        undisturbed=theirs,
    )


def _worse(engines: Engines, ids: list[int], answer: Answer) -> float:
    """The share of an answer's tokens that are not nearly the best ones behind this prompt."""
    below = engines["c"].shortfalls(ids + answer.tokens, len(ids), engines.seconds)
    return sum(each > SHORTFALL for each in below) / len(below)
