"""The worker half: every import that came in is reported once, whatever happens to it."""

import dataclasses
import logging
import queue
from contextlib import ExitStack, closing

import numpy as np
import pytest
import torch

from engine.connector.step_messages import ImportReport, StepMetadata, WorkerReport
from engine.connector.worker import WorkerHalf
from tests.unit.engine.keeper import Keeper
from tests.unit.transport.table_fixtures import writer
from transport.backends.base import ImportJob
from transport.backends.shared_memory import SharedMemoryTransport
from transport.frames.layouts import cpu_attention
from transport.frames.shape import Number
from transport.keys import chain_keys, root_key
from transport.table.reader import TableReader

KEYS = chain_keys(root_key(b"f" * 16), range(32), 4)


def caches(value):
    return {"layer": torch.full((8, 2, 4, 8), value)}


@pytest.fixture
def owner(tmp_path):
    tensors = caches(7.0)
    transport = SharedMemoryTransport(tensors, 8)
    with closing(writer(tmp_path, "owner", 8, memories=(transport.memory(),))) as table:
        yield table


def job(owner, request_id="r", source="owner", epoch=None):
    owner.publish([1, 2], KEYS[:2])
    reader = TableReader(owner.path)
    run = reader.longest_run(KEYS[:2])
    return ImportJob(request_id, source, epoch or reader.epoch, run.block_ids, run.states, np.array([4, 5], np.int32))


@pytest.fixture
def landing():
    """The importer's caches."""
    return caches(0.0)


@pytest.fixture
def registered(tmp_path):
    """Makes worker halves, and closes them."""
    with ExitStack() as made:

        def make(caches, name="importer", groups=None):
            half = made.enter_context(closing(WorkerHalf(tmp_path, name, 0)))
            half.register(caches, 8, groups)
            return half

        yield make


@pytest.fixture
def worker(registered, landing):
    half = registered(landing)
    assert half.handshake({"a": "b"}).status == "ok"
    return half


def test_a_transport_is_told_before_a_step_that_imports_will_begin_in_it_and_of_no_other(owner, worker, monkeypatch):
    told = []
    monkeypatch.setattr(SharedMemoryTransport, "before_step", lambda _: told.append(1))
    worker.store(StepMetadata(2))
    assert told == []
    worker.store(StepMetadata(3, (job(owner),)))
    assert len(told) == 1


def test_an_import_is_reported_once_with_what_it_cost(owner, worker, landing):
    worker.start(StepMetadata(3, (job(owner),)))
    assert worker.poll() == {"r"}
    assert worker.take_load_errors() == set()
    report = worker.take_report()
    assert (report.step, report.ranks) == (3, {"r": 1})
    assert report.imports["r"].bytes == 2 * 2 * 4 * 8 * 4
    assert landing["layer"][4:6].eq(7.0).all()
    assert landing["layer"][6:].eq(0.0).all()
    assert worker.poll() == set()
    assert worker.take_report() == WorkerReport(3, {}, {})


def test_of_two_imports_of_one_request_the_second_fails_and_both_are_reported_as_the_first_ends(owner, worker, landing):
    second = dataclasses.replace(job(owner), target_blocks=np.array([6, 7], np.int32))
    worker.start(StepMetadata(3, (job(owner), second)))
    assert worker.poll() == {"r"}
    assert worker.take_load_errors() == {6, 7}
    assert worker.take_report().imports["r"].failed_blocks == {6, 7}
    assert worker.poll() == set()
    assert landing["layer"][4:6].eq(7.0).all()
    assert landing["layer"][6:].eq(0.0).all()


def test_owners_are_prepared_for_when_they_come_and_let_go_when_they_end(owner, worker, monkeypatch):
    seen = queue.Queue()
    monkeypatch.setattr(worker._transport, "prepare", lambda reader: seen.put(("prepare", reader.name, reader.epoch)))
    monkeypatch.setattr(worker._transport, "retain", lambda live: seen.put(("retain", live)))
    epoch = owner.epoch
    while seen.get(timeout=10) != ("retain", {("owner", epoch)}):
        pass
    assert seen.get(timeout=10) == ("prepare", "owner", epoch)
    owner.close()
    while seen.get(timeout=10) != ("retain", set()):
        pass
    assert seen.get(timeout=10) == ("retain", set())


@pytest.mark.parametrize("about", [{"source": "nobody"}, {"source": ""}, {"epoch": 1}])
def test_a_source_that_is_gone_fails_the_import_at_once(owner, worker, about):
    worker.start(StepMetadata(1, (job(owner, **about),)))
    assert worker.poll() == {"r"}
    assert worker.take_load_errors() == {4, 5}
    report = worker.take_report().imports["r"]
    assert report.failed_blocks == {4, 5}
    assert report.early  # or of another node's, in the same epoch after an interruption, nothing would be imported any more


def test_memory_that_can_not_be_opened_fails_the_import(owner, registered):
    half = registered({"layer": torch.zeros(8, 2, 4, 16)})
    half.start(StepMetadata(1, (job(owner),)))
    assert half.poll() == {"r"}
    assert half.take_load_errors() == {4, 5}


def test_an_import_of_several_groups_that_fails_is_reported_by_its_request(owner, worker, registered):
    whole = job(owner, "whole")
    failing = job(owner, "failing", epoch=1)
    jobs = tuple(dataclasses.replace(each, counts=(1, 1)) for each in (whole, failing))
    layers = {"full": torch.zeros(8, 2, 4, 8), "window": torch.zeros(8, 2, 4, 8)}
    half = registered(layers, "several", {"full": 0, "window": 1})
    half.start(StepMetadata(1, jobs))
    assert half.poll() == {"whole", "failing"}
    assert half.take_load_errors() == set()
    assert half.take_failed() == {"whole", "failing"}  # the owner's layers are of one group: its memory is not ours
    assert half.take_failed() == set()


def test_an_unexpected_fault_in_starting_fails_every_import_of_the_step(owner, worker, monkeypatch):
    def fault(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(worker._transport, "start", fault)
    with pytest.raises(RuntimeError):
        worker.start(StepMetadata(1, (job(owner, "r"), job(owner, "s"))))
    assert worker.poll() == {"r", "s"}
    assert worker.take_load_errors() == {4, 5}
    assert set(worker.take_report().imports) == {"r", "s"}
    assert worker.poll() == set()


def test_memory_that_is_given_up_is_told_and_imports_into_it_fail(owner, worker, landing):
    worker.start(StepMetadata(1, (job(owner, "r"),)))
    worker.unmap()
    worker.unmap()
    worker.start(StepMetadata(2, (job(owner, "s"),)))
    assert worker.poll() == {"r", "s"}
    assert worker.take_report().unmapped
    assert landing["layer"].eq(0.0).all()


def test_memory_that_is_registered_again_is_shared_again_and_steps_count_from_one(owner, worker, landing):
    worker.start(StepMetadata(7))
    worker.unmap()
    assert worker.handshake({}).memory is None
    assert "gave its KV memory up" in worker.handshake({}).status
    worker.register(landing, 8)
    shake, report = worker.handshake({}), worker.take_report()
    assert (shake.status, report.step, report.unmapped) == ("ok", 0, False)
    assert shake.memory is not None
    worker.start(StepMetadata(1, (job(owner),)))
    assert worker.poll() == {"r"}
    assert worker.take_report().imports["r"].failed_blocks == frozenset()
    assert landing["layer"][[4, 5]].eq(7.0).all()


def test_after_a_fault_in_the_transport_every_import_is_failed_not_forgotten(owner, worker):
    worker.start(StepMetadata(1, (job(owner, "r"), job(owner, "s"))))
    assert worker.fail_all("fault") == {"r", "s"}
    assert worker.take_load_errors() == {4, 5}
    assert set(worker.take_report().imports) == {"r", "s"}


@pytest.fixture
def other(tmp_path):
    """Another owner, whose blocks hold something else."""
    transport = SharedMemoryTransport(caches(3.0), 8)
    with closing(writer(tmp_path, "other", 8, memories=(transport.memory(),))) as table:
        yield table


def behind(table, request_id="r", source="other", epoch=None):
    """The second job of a request whose first is `job`: one block."""
    table.publish([6], KEYS[2:3])
    run = TableReader(table.path).longest_run(KEYS[2:3])
    targets = np.array([2], np.int32)
    return ImportJob(request_id, source, epoch or table.epoch, run.block_ids, run.states, targets, (), 1)


class Slow(SharedMemoryTransport):
    """What it reads of `held` ends when that is emptied."""

    held = ("other",)

    def poll(self):
        waiting = [copy for copy in self._copies if copy.job.source in self.held]
        for copy in waiting:
            self._copies.remove(copy)
        results = super().poll()
        self._copies.extend(waiting)
        return results


@pytest.fixture
def slow(worker, landing):
    worker._transport.close()
    worker._transport = Slow(landing, 8)
    return worker


def test_an_import_from_two_sources_is_reported_once_both_have_ended(owner, other, slow, landing):
    slow.start(StepMetadata(3, (job(owner), behind(other), job(owner, "s"))))
    assert slow.poll() == {"s"}
    early = slow.take_report()
    assert (set(early.imports), early.checked) == ({"s"}, {"r": 2})  # vLLM may enter the first source's blocks
    slow._transport.held = ()
    assert slow.poll() == {"r"}
    report = slow.take_report()
    assert ([each.bytes for each in report.imports["r"].by_source()], report.checked) == ([512, 256], {})
    assert slow.take_load_errors() == set()
    assert landing["layer"][4:6].eq(7.0).all()
    assert landing["layer"][2].eq(3.0).all()
    assert slow.poll() == set()


@pytest.mark.parametrize("about", [{"source": "nobody"}, {"epoch": 1}])
def test_blocks_of_a_first_source_that_fails_are_reported_when_the_second_no_longer_writes(owner, other, slow, about):
    slow.start(StepMetadata(3, (job(owner, **about), behind(other))))
    assert slow.poll() == set()
    assert slow.take_load_errors() == set()
    assert (slow.take_report().imports, slow.take_report().checked) == ({}, {})
    slow._transport.held = ()
    assert slow.poll() == {"r"}
    assert slow.take_load_errors() == {4, 5}
    assert [each.failed_blocks for each in slow.take_report().imports["r"].by_source()] == [{4, 5}, frozenset()]


def test_an_owner_that_ends_amid_a_mixed_import_fails_its_own_blocks(owner, other, slow):
    slow.start(StepMetadata(3, (job(owner), behind(other))))
    assert slow.poll() == set()
    other.close()
    slow._transport.held = ()
    assert slow.poll() == {"r"}
    assert slow.take_load_errors() == {2}
    reports = slow.take_report().imports["r"].by_source()
    assert [each.reason for each in reports] == ["", "other ended while it was read"]


def test_memory_that_is_given_up_amid_a_mixed_import_ends_it_once(owner, other, slow):
    slow.start(StepMetadata(3, (job(owner), behind(other))))
    assert slow.poll() == set()
    slow.unmap()
    assert slow.poll() == {"r"}
    assert slow.take_load_errors() == {2}
    assert [each.failed_blocks for each in slow.take_report().imports["r"].by_source()] == [frozenset(), {2}]
    assert slow.fail_all("again") == set()


def test_kv_memory_on_an_unknown_device_is_refused_with_the_reason(registered):
    half = registered({"layer": torch.zeros(8, 2, 4, 8, device="meta")})
    shake = half.handshake({})
    assert shake.memory is None
    assert "meta" in shake.status


def test_reports_of_several_ranks_add_up_to_the_worse():
    good = WorkerReport(4, {"r": ImportReport(frozenset(), 0, 10, 5, "")}, {"r": 1})
    bad = WorkerReport(4, {"r": ImportReport(frozenset({4}), 1, 10, 9, "changed")}, {"r": 1})
    for merged in (good.aggregate(bad), bad.aggregate(good)):
        assert merged == WorkerReport(4, {"r": ImportReport(frozenset({4}), 1, 20, 9, "changed")}, {"r": 2}, workers=2)


def test_of_several_ranks_blocks_are_good_that_all_of_them_call_so():
    one, other, third = (WorkerReport(4, checked=good) for good in ({"r": 8, "s": 4}, {"r": 14, "t": 4}, {"r": 9}))
    for merged in (one.aggregate(other).aggregate(third), third.aggregate(other.aggregate(one))):
        assert (merged.checked, merged.workers) == ({"r": 8}, 3)


class Late(SharedMemoryTransport):
    """Its imports end when they were polled for so often, and are expected to end `soon`."""

    polls, soon = 5, True

    def poll(self):
        self.polls -= 1
        return super().poll() if self.polls <= 0 else []

    def ends_within(self, seconds):
        return self.soon


@pytest.fixture
def late(worker, landing, monkeypatch):
    monkeypatch.setattr("engine.connector.worker.WAIT_SECONDS", 20.0)
    worker._transport.close()
    worker._transport = Late(landing, 8)
    return worker


def test_a_step_that_computes_nothing_waits_for_an_import_that_is_about_to_end(owner, late):
    late.start(StepMetadata(3, (job(owner),)))
    assert late.poll() == {"r"}


@pytest.mark.parametrize(("computes", "soon"), [(True, True), (False, False)])
def test_no_step_waits_that_computes_something_or_for_an_import_that_takes_longer(owner, late, computes, soon):
    late._transport.soon = soon
    late.start(StepMetadata(3, (job(owner),), computes))
    assert late.poll() == set()
    assert late._transport.polls == 4


def test_the_wait_for_an_import_is_bounded(owner, late, monkeypatch):
    monkeypatch.setattr("engine.connector.worker.WAIT_SECONDS", 0.01)
    late._transport.polls = 1 << 60
    late.start(StepMetadata(3, (job(owner),)))
    assert late.poll() == set()


STRIDES = "torch.bfloat16 (2, 16, 64) (2048, 1024, 64, 1)"
LOSSY = {"kv dtype": "auto", "attention backend": "CPU_ATTN", "cpu layout": "vec", "strides": STRIDES}


def slots_of(path, fields, codec="int8", **more):
    """How a worker cuts its host memory, given the fields of the fingerprint if blocks are to be coded."""
    layers = {f"layer.{number}": torch.zeros(8, 2, 16, 64, dtype=torch.bfloat16) for number in range(2)} | more
    keeper = Keeper(path / str(len(list(path.iterdir()))))
    keeper._table_dir.mkdir()
    with closing(WorkerHalf(path, "r", 0, keeper.keep("r", 1 << 20))) as half:
        half.register(layers, 8, None, fields, codec)
        return half.handshake({}).host_memory


def test_host_memory_codes_blocks_where_their_layout_is_known_and_that_is_asked_for(tmp_path, caplog):
    assert slots_of(tmp_path, None).memory.coded is None
    coded = slots_of(tmp_path, LOSSY).memory.coded
    assert coded.shape == cpu_attention(2, 2, 16, 32, Number.BFLOAT16).packed.hex()
    assert caplog.records == []
    caplog.set_level(logging.INFO)
    for fields, more in (
        (LOSSY | {"attention backend": "MAMBA"}, {}),
        (LOSSY, {"state": torch.zeros(8, 100)}),
    ):
        assert slots_of(tmp_path, fields, **more).memory.coded is None
    assert [record.getMessage() for record in caplog.records] == [
        "host memory keeps all blocks as they are: their layout is not one that int8 codes here"
    ] * 2


@pytest.mark.parametrize("codec", ["int8", "rot4", "rot3"])
def test_host_memory_codes_by_the_codec_that_is_asked_for(tmp_path, codec):
    assert slots_of(tmp_path, LOSSY, codec).memory.coded.codec == codec


def test_without_numba_host_memory_codes_nothing_and_says_so(tmp_path, caplog, monkeypatch):
    def missing(name):
        raise ImportError("no numba")

    monkeypatch.setattr("engine.connector.worker.compile_codec", missing)
    assert slots_of(tmp_path, LOSSY).memory.coded is None
    assert "host memory codes no blocks: no numba" in caplog.text
