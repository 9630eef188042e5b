"""Imports, hits, aborts and resets at random, in vLLM's own scheduler: whatever a step reads is what its tokens make."""

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

from engine.connector.jobs import Jobs
from engine.connector.step_messages import ImportReport, StepMetadata, WorkerReport
from tests.unit.engine.connector.test_in_vllms_scheduler import BLOCKS, SIZE, Engine
from transport.backends.base import ImportJob, JobId
from transport.keys import chain_keys, root_key

PROMPTS = [list(range(first, first + 9 * SIZE + 3)) for first in (100, 400)]
OWNERS = ("owner", "other")
STEPS = 1000
Block = list[int | None]


@dataclass(slots=True)
class Copy:
    """An import under way: so many of its blocks are here."""

    job: ImportJob
    here: int = 0


class Computing(Engine):
    """An engine whose blocks hold, for each token, what it and all before it make; None is what must not be read.

    Its imports come from `owners`, a few blocks of each in a step; some end early, and what is missing fails.
    """

    def __init__(self, *given, owners: "tuple[Computing, ...]" = (), rng: random.Random | None = None, **about) -> None:
        self.owners, self.rng = {owner.table.name: owner for owner in owners}, rng or random.Random(0)
        self.content: list[Block] = [[None] * SIZE for _ in range(BLOCKS)]
        self.tokens: dict[str, list[int]] = {}
        self.blocks: dict[str, list[int]] = {}
        self.copies: dict[JobId, Copy] = {}
        self.jobs = Jobs()
        self.hits_beside_imports = self.failed_behind_good = self.failed_while_others_go_on = 0
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
        self.jobs.begin(step.imports)
        for job in step.imports:
            self.copies[job.id] = Copy(job)
            self.spoil(job.target_blocks.tolist())
        ended: dict[str, ImportReport] = {}
        checked = {}
        for name, copy in list(self.copies.items()):
            targets, known = copy.job.target_blocks.tolist(), copy.here
            if copy.job.source:
                copy.here = min(len(targets), copy.here + self.rng.choice((0, 0, 1, 2, 3)))
                for source, target in zip(copy.job.source_blocks.tolist()[known : copy.here], targets[known:], strict=False):
                    self.content[target] = list(self.owners[copy.job.source].content[source])
            if copy.here == len(targets) or not copy.job.source or self.rng.random() < 0.08:
                failed = targets[copy.here :]
                self.failed_behind_good += bool(failed and known)
                self.spoil(failed)
                told = ImportReport(frozenset(failed), len(failed), 100, 10, "changed" if failed else "")
                del self.copies[name]
                if (whole := self.jobs.end(copy.job, told)) is not None:
                    ended[copy.job.request_id] = whole
                self.failed_while_others_go_on += bool(failed and whole is None)
            elif copy.here:
                checked[name] = copy.here
        wrong = {block for report in ended.values() for each in report.by_source() for block in each.failed_blocks}
        report = WorkerReport(step.step, ended, dict.fromkeys(ended, 1), checked=self.jobs.checked(checked))
        return KVConnectorOutput(finished_recving=set(ended) or None, invalid_block_ids=wrong, kv_connector_worker_meta=report)

    def spoil(self, blocks: list[int]) -> None:
        for block in blocks:
            self.content[block] = [None] * SIZE


@pytest.fixture(params=[("v1", 0), ("v1", 1), ("v2", 1)], ids=["v1", "v1-ahead", "v2-ahead"])
def engine(request, tmp_path) -> Iterator[Computing]:
    owners = tuple(Computing(tmp_path, *request.param, name=name) for name in OWNERS)
    for owner in owners:
        for number, prompt in enumerate(PROMPTS):
            owner.add_ids(f"o{number}", prompt, 1, source="")
        owner.run()
    made = Computing(tmp_path, *request.param, owners=owners, rng=random.Random(3))
    yield made
    for each in (made, *owners):
        each.table.close()
        each.scheduler.connector.shutdown()


class Offered:
    """What the owners hold of PROMPTS; `some` has each of them offer all of it but a few blocks in a row of each prompt."""

    def __init__(self, owners, rng: random.Random) -> None:
        self.rng = rng
        self.tables = [owner.scheduler.connector._scheduler.table for owner in owners]
        self.keys = np.concatenate([chain_keys(root_key(owners[0].table.fingerprint), prompt, SIZE) for prompt in PROMPTS])
        self.blocks = []
        for owner in owners:
            held, blocks, _ = owner.table.look_up(self.keys)
            assert held.all()
            self.blocks.append(blocks)

    def some(self) -> None:
        for table, blocks in zip(self.tables, self.blocks, strict=True):
            table.clear()
            each = len(blocks) // len(PROMPTS)
            gaps = [self.rng.randrange(each) for _ in PROMPTS]
            gone = {number * each + gap + more for number, gap in enumerate(gaps) for more in range(min(3, each - gap))}
            places = [place for place in range(len(blocks)) if place not in gone]
            table.publish(blocks[places], self.keys[places])


def test_no_step_reads_what_its_tokens_do_not_make_and_all_blocks_are_free_in_the_end(engine):
    rng, asked = engine.rng, 0
    offered = Offered(list(engine.owners.values()), rng)
    offered.some()
    for _ in range(STEPS):
        chance, requests = rng.random(), engine.scheduler.requests
        if chance < 0.25 and len(requests) < 6:
            prompt = rng.choice(PROMPTS)
            ids = prompt[: rng.randint(1, len(prompt)) if rng.random() < 0.6 else len(prompt)] + [
                900 + rng.randrange(3)
            ] * rng.randint(0, 20)
            asked += 1
            engine.add_ids(f"r{asked}", ids, rng.randint(1, 20), tag=asked, source=rng.choice((*OWNERS, None, "")))
        elif chance < 0.29 and requests:
            engine.scheduler.finish_requests(rng.choice(list(requests)), RequestStatus.FINISHED_ABORTED)
        elif chance < 0.35:
            offered.some()
        elif chance < 0.42:
            with suppress(RuntimeError):  # vLLM refuses to reset while an import is under way, with all preempted
                engine.scheduler.reset_prefix_cache(reset_running_requests=rng.random() < 0.7)
        if engine.scheduler.has_requests():
            engine.step()
        elif engine.under_way:
            engine._report(engine.under_way.pop(0))
    engine.run(2000)
    assert engine.hits_beside_imports > 0
    assert engine.failed_behind_good > 0
    assert engine.failed_while_others_go_on > 0
    records = [record for record in engine.records.values() if record.scheduled_ns]
    assert sum(bool(record.further) for record in records) > 5
    assert all(record.prompt_tokens == record.local_tokens + record.peer_tokens + record.computed_tokens for record in records)
    assert engine.pool.get_num_free_blocks() == BLOCKS - 1
    assert engine.table.counters()["table_errors"] == 0
