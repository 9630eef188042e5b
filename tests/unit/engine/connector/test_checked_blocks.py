"""Blocks that are good while the rest of their import is under way, in vLLM's own scheduler."""

from collections.abc import Iterator

import pytest
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

from engine.connector.step_messages import ImportReport, StepMetadata, WorkerReport
from tests.unit.engine.connector.test_in_vllms_scheduler import BLOCKS, SIZE, Engine
from transport.backends.base import ImportJob

PROMPT = list(range(500, 500 + 6 * SIZE + 3))


class Importing(Engine):
    """An engine whose worker's words about imports a test chooses."""

    def __init__(self, *given, **about) -> None:
        super().__init__(*given, **about)
        self.jobs: list[ImportJob] = []
        self.checked: dict[str, int] = {}
        self.ended: dict[str, ImportReport] = {}

    def _tell(self, step: StepMetadata) -> KVConnectorOutput:
        self.jobs += step.imports
        ended, self.ended = self.ended, {}
        failed = {block for report in ended.values() for block in report.failed_blocks}
        report = WorkerReport(step.step, ended, dict.fromkeys(ended, 1), checked=dict(self.checked))
        return KVConnectorOutput(finished_recving=set(ended) or None, invalid_block_ids=failed, kv_connector_worker_meta=report)

    def end(self, failed: list[int]) -> None:
        self.checked, self.ended = {}, {"r": ImportReport(frozenset(failed), len(failed), 100, 10, "changed" if failed else "")}


@pytest.fixture(params=[("v1", 0), ("v2", 1)], ids=["v1", "v2-ahead"])
def engine(request, tmp_path) -> Iterator[Importing]:
    """One that imports the six blocks of PROMPT from another, as request "r"."""
    owner, made = Engine(tmp_path, *request.param, name="owner"), Importing(tmp_path, *request.param)
    owner.add_ids("r", PROMPT, 1, source="")
    owner.run()
    made.add_ids("r", PROMPT, 2, tag=1, source="owner")
    for _ in range(3):
        made.step()
    assert [len(job) for job in made.jobs] == [6]
    yield made
    made.run()
    assert made.pool.get_num_free_blocks() == BLOCKS - 1
    assert made.table.counters()["table_errors"] == 0
    for each in (owner, made):
        each.table.close()
        each.scheduler.connector.shutdown()


def served(engine: Importing, tag: int) -> tuple[int, int]:
    """Ask for PROMPT as well; return how many tokens of it were here and how many were computed."""
    engine.add_ids(f"other{tag}", PROMPT, 1, tag=tag, source="")
    for _ in range(4):
        engine.step()
    (found,) = [each for each in engine.table.deliveries(0)[1] if each.tag == tag]
    return found.local_tokens, found.computed_tokens


def test_others_compute_what_is_not_known_to_be_good(engine):
    assert served(engine, 2) == (0, len(PROMPT))
    engine.end([])


def test_others_hit_blocks_that_are_good(engine):
    engine.checked = {"r": 4}
    for _ in range(3):
        engine.step()
    assert served(engine, 2) == (4 * SIZE, len(PROMPT) - 4 * SIZE)
    engine.end([])
    engine.run()
    assert (engine.records[1].peer_tokens, engine.records[1].computed_tokens) == (6 * SIZE, 3)


def test_what_is_good_is_used_although_the_rest_fails(engine):
    engine.checked = {"r": 4}
    for _ in range(3):
        engine.step()
    engine.end([engine.jobs[0].target_blocks[5].item()])
    engine.run()
    found = engine.records[1]
    assert (found.peer_tokens, found.computed_tokens, found.failed_blocks) == (5 * SIZE, len(PROMPT) - 5 * SIZE, 1)
    assert served(engine, 2) == (6 * SIZE, 3)


def test_a_fault_after_blocks_were_good_computes_all_that_is_not_in_the_cache(engine):
    engine.checked = {"r": 4}
    for _ in range(3):
        engine.step()
    engine.end(engine.jobs[0].target_blocks.tolist())
    engine.run()
    assert engine.records[1].computed_tokens == len(PROMPT) - 4 * SIZE


def test_a_request_that_is_aborted_leaves_what_was_good(engine):
    engine.checked = {"r": 4}
    for _ in range(3):
        engine.step()
    engine.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    engine.checked = {"r": 5}
    for _ in range(3):
        engine.step()
    engine.end([])
    engine.run()
    assert served(engine, 2) == (4 * SIZE, len(PROMPT) - 4 * SIZE)
