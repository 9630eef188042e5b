"""Imports, hits, aborts and resets at random, in vLLM's own scheduler: whatever a step reads is what its tokens make."""

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import pytest
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

from engine.connector.step_messages import ImportReport, StepMetadata, WorkerReport
from tests.unit.engine.connector.test_in_vllms_scheduler import BLOCKS, SIZE, Engine
from transport.backends.base import ImportJob

PROMPTS = [list(range(first, first + 9 * SIZE + 3)) for first in (100, 400)]
STEPS = 1000
Block = list[int | None]


@dataclass(slots=True)
class Copy:
    """An import under way: so many of its blocks are here."""

    job: ImportJob
    here: int = 0


class Computing(Engine):
    """An engine whose blocks hold, for each token, what it and all before it make; None is what must not be read.

    Its imports come from `owner`, a few blocks in a step; some end early, and what is missing fails.
    """

    def __init__(self, *given, owner: "Computing | None" = None, rng: random.Random | None = None, **about) -> None:
        self.owner, self.rng = owner, rng or random.Random(0)
        self.content: list[Block] = [[None] * SIZE for _ in range(BLOCKS)]
        self.tokens: dict[str, list[int]] = {}
        self.blocks: dict[str, list[int]] = {}
        self.copies: dict[str, Copy] = {}
        self.hits_beside_imports = self.failed_behind_good = 0
        super().__init__(*given, **about)

    def add_ids(self, name, ids, answer, **hint):
        self.tokens[name] = ids + [7] * 30
        return super().add_ids(name, ids, answer, **hint)

    def _report(self, output) -> None:
        """Compute a step: as in a layer of a model, all its tokens are written before any is read."""
        read = []
        for new in output.scheduled_new_reqs:
            self.blocks[new.req_id] = list(new.block_ids[0])
            read.append((new.req_id, new.num_computed_tokens))
            hit, coming = self.blocks[new.req_id][: new.num_computed_tokens // SIZE], self.copies.values()
            self.hits_beside_imports += any(not set(hit).isdisjoint(copy.job.target_blocks.tolist()) for copy in coming)
        cached = output.scheduled_cached_reqs
        for name, added, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            if added:
                self.blocks[name] = (self.blocks[name] if name not in cached.resumed_req_ids else []) + added[0]
            read.append((name, computed))
        for name, computed in read:
            for place in range(computed, computed + output.num_scheduled_tokens[name]):
                self.content[self.blocks[name][place // SIZE]][place % SIZE] = self.made(name, place)
        self._look(read, output.num_scheduled_tokens)
        super()._report(output)

    def _look(self, read: list[tuple[str, int]], written: dict[str, int]) -> None:
        """Read what is taken for computed, of each request so many tokens, before those that are `written` in this step."""
        for name, computed in read:
            for place in range(computed):
                assert self.content[self.blocks[name][place // SIZE]][place % SIZE] == self.made(name, place), (name, place)

    def made(self, name: str, place: int) -> int:
        return hash(tuple(self.tokens[name][: place + 1]))

    def _tell(self, step: StepMetadata) -> KVConnectorOutput:
        for job in step.imports:
            self.copies[job.request_id] = Copy(job)
            self.spoil(job.target_blocks.tolist())
        ended: dict[str, ImportReport] = {}
        checked = {}
        for name, copy in list(self.copies.items()):
            targets, known = copy.job.target_blocks.tolist(), copy.here
            if self.owner is not None and copy.job.source:
                copy.here = min(len(targets), copy.here + self.rng.choice((0, 0, 1, 2, 3)))
                for source, target in zip(copy.job.source_blocks.tolist()[known : copy.here], targets[known:], strict=False):
                    self.content[target] = list(self.owner.content[source])
            if copy.here == len(targets) or not copy.job.source or self.rng.random() < 0.08:
                failed = targets[copy.here :]
                self.failed_behind_good += bool(failed and known)
                self.spoil(failed)
                ended[name] = ImportReport(frozenset(failed), len(failed), 100, 10, "changed" if failed else "")
                del self.copies[name]
            elif copy.here:
                checked[name] = copy.here
        wrong = {block for report in ended.values() for block in report.failed_blocks}
        report = WorkerReport(step.step, ended, dict.fromkeys(ended, 1), checked=checked)
        return KVConnectorOutput(finished_recving=set(ended) or None, invalid_block_ids=wrong, kv_connector_worker_meta=report)

    def spoil(self, blocks: list[int]) -> None:
        for block in blocks:
            self.content[block] = [None] * SIZE


@pytest.fixture(params=[("v1", 0), ("v1", 1), ("v2", 1)], ids=["v1", "v1-ahead", "v2-ahead"])
def engine(request, tmp_path) -> Iterator[Computing]:
    owner = Computing(tmp_path, *request.param, name="owner")
    for number, prompt in enumerate(PROMPTS):
        owner.add_ids(f"o{number}", prompt, 1, source="")
    owner.run()
    made = Computing(tmp_path, *request.param, owner=owner, rng=random.Random(3))
    yield made
    for each in (made, owner):
        each.table.close()
        each.scheduler.connector.shutdown()


def test_no_step_reads_what_its_tokens_do_not_make_and_all_blocks_are_free_in_the_end(engine):
    rng, asked = engine.rng, 0
    for _ in range(STEPS):
        chance, requests = rng.random(), engine.scheduler.requests
        if chance < 0.25 and len(requests) < 6:
            prompt = rng.choice(PROMPTS)
            ids = prompt[: rng.randint(1, len(prompt))] + [900 + rng.randrange(3)] * rng.randint(0, 20)
            asked += 1
            engine.add_ids(f"r{asked}", ids, rng.randint(1, 20), tag=asked, source=rng.choice(("owner", "owner", "")))
        elif chance < 0.29 and requests:
            engine.scheduler.finish_requests(rng.choice(list(requests)), RequestStatus.FINISHED_ABORTED)
        elif chance < 0.31:
            with suppress(RuntimeError):  # vLLM refuses to reset while an import is under way, with all preempted
                engine.scheduler.reset_prefix_cache(reset_running_requests=rng.random() < 0.7)
        if engine.scheduler.has_requests():
            engine.step()
        elif engine.under_way:
            engine._report(engine.under_way.pop(0))
    engine.run(2000)
    assert engine.hits_beside_imports > 0
    assert engine.failed_behind_good > 0
    assert engine.pool.get_num_free_blocks() == BLOCKS - 1
    assert engine.table.counters()["table_errors"] == 0
