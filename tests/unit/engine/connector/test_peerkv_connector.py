"""The connector's shell: no exception reaches vLLM, and after a fault nothing is offered or imported."""

from types import SimpleNamespace

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, KVConnectorTransferResults
from vllm.v1.request import RequestStatus

from engine.connector.peerkv_connector import PeerKVConnector, _refusal
from engine.connector.step_messages import StepMetadata
from transport.groups import Group


class Faulty:
    """A half whose every method raises, and that remembers that it was withdrawn."""

    withdrawn = False

    def withdraw(self):
        self.withdrawn = True

    def take_starting(self):
        return ("job",)

    def fail_all(self, reason):
        return {"r"}

    def take_failed(self):
        return {"r"}

    def __getattr__(self, name):
        def fault(*_):
            raise RuntimeError(f"fault in {name}")

        return fault


def connector(role, **extra):
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra, is_kv_producer=True),
        parallel_config=SimpleNamespace(rank=0, tensor_parallel_size=1, pipeline_parallel_size=1),
    )
    return PeerKVConnector(config, role, SimpleNamespace(num_blocks=8, kv_cache_groups=[]))


REQUEST = SimpleNamespace(request_id="r", status=RequestStatus.FINISHED_STOPPED)
BLOCKS = SimpleNamespace(get_block_ids=lambda: ([1, 2],))


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (lambda c: c.update_state_after_alloc(REQUEST, BLOCKS, 32), None),
        (lambda c: c.build_connector_meta(SimpleNamespace()), StepMetadata(0, ("job",))),
        (lambda c: c.request_finished_all_groups(REQUEST, ([1],)), (False, None)),
        (lambda c: c.bind_gpu_block_pool(SimpleNamespace(reset_prefix_cache=None)), None),
        (lambda c: c.reset_cache(), True),
    ],
)
def test_a_fault_in_the_schedulers_half_stays_inside_and_withdraws_everything(call, answer):
    shell = connector(KVConnectorRole.SCHEDULER)
    shell._scheduler = half = Faulty()
    assert call(shell) == answer
    assert half.withdrawn


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (lambda c: c.get_transfer_results(set()), KVConnectorTransferResults(set(), {"r"}, {"r"})),
        (lambda c: c.register_kv_caches({}), None),
        (lambda c: c.start_load_kv(None, some_new_argument=1), None),
    ],
)
def test_a_fault_in_the_workers_half_stays_inside_and_fails_its_imports(call, answer):
    shell = connector(KVConnectorRole.WORKER)
    shell._worker = Faulty()
    shell.bind_connector_metadata(StepMetadata(1))
    assert call(shell) == answer


def test_one_odd_request_is_a_miss_and_no_reason_to_stop_the_exchange():
    shell = connector(KVConnectorRole.SCHEDULER)
    counted = []
    shell._scheduler = SimpleNamespace(match=lambda *_: 1 // 0, table=SimpleNamespace(count=counted.append))
    assert shell.get_num_new_matched_tokens(REQUEST, 0) == (0, False)
    assert counted == ["table_errors"]


def test_a_request_that_can_not_be_taken_note_of_is_served_all_the_same():
    shell = connector(KVConnectorRole.SCHEDULER)
    counted = []
    shell._scheduler = SimpleNamespace(arrived=lambda *_: 1 // 0, table=SimpleNamespace(count=counted.append))
    assert shell.on_new_request(REQUEST) is None
    assert counted == ["table_errors"]


@pytest.mark.parametrize(
    ("status", "aborted"),
    [("FINISHED_STOPPED", False), ("FINISHED_LENGTH_CAPPED", False), ("FINISHED_ABORTED", True), ("FINISHED_ERROR", True)],
)
def test_a_request_without_an_answer_counts_as_aborted(status, aborted):
    shell = connector(KVConnectorRole.SCHEDULER)
    told = []
    shell._scheduler = SimpleNamespace(finished=lambda request_id, aborted: told.append((request_id, aborted)))
    shell.request_finished(SimpleNamespace(request_id="r", status=RequestStatus[status]), [])
    assert told == [("r", aborted)]


def test_pins_end_before_the_pool_is_reset():
    shell, done = connector(KVConnectorRole.SCHEDULER), []
    pool = SimpleNamespace(reset_prefix_cache=lambda: done.append("reset"))
    shell.bind_gpu_block_pool(pool)
    pool.reset_prefix_cache()
    shell._scheduler = SimpleNamespace(unpin=lambda: done.append("unpin"))
    pool.reset_prefix_cache()
    assert done == ["reset", "unpin", "reset"]


@pytest.mark.parametrize("share", [-0.1, 1.0, 3])
def test_a_share_for_pins_that_is_none_is_refused_at_start(share):
    with pytest.raises(ValueError, match="pin_share_max"):
        connector(KVConnectorRole.SCHEDULER, pin_share_max=share)


@pytest.mark.parametrize("share", [0, -0.5, 1.1])
def test_a_share_for_tenants_that_is_none_is_refused_at_start(share):
    with pytest.raises(ValueError, match="tenant_share_max"):
        connector(KVConnectorRole.SCHEDULER, tenant_share_max=share)


@pytest.mark.parametrize("seconds", ["inf", "nan", 1e300, -1])
def test_a_time_that_cannot_be_counted_for_blocks_in_host_memory_is_refused(seconds):
    with pytest.raises(ValueError, match=r"host_memory_ttl_seconds is .*, not from 0 to 315360000"):
        connector(KVConnectorRole.SCHEDULER, host_memory_ttl_seconds=seconds)


def test_a_failed_import_is_always_computed_whatever_the_server_was_told():
    assert connector(KVConnectorRole.SCHEDULER)._vllm_config.kv_transfer_config.kv_load_failure_policy == "recompute"


def test_a_table_that_can_not_even_be_withdrawn_ends():
    shell = connector(KVConnectorRole.SCHEDULER)
    ended = []
    shell._scheduler = SimpleNamespace(
        finished=lambda *_, **__: 1 // 0, withdraw=lambda: 1 // 0, table=SimpleNamespace(end=lambda: ended.append(True))
    )
    assert shell.request_finished(REQUEST, []) == (False, None)
    assert ended == [True]


def test_without_a_table_nothing_is_matched_and_steps_go_on():
    shell = connector(KVConnectorRole.SCHEDULER)
    assert shell.get_num_new_matched_tokens(REQUEST, 0) == (0, False)
    assert shell.build_connector_meta(SimpleNamespace()) == StepMetadata(0)
    assert shell.requires_kv_delivery is False


def test_kv_memory_is_given_up_before_vllm_sleeps_and_shared_anew_when_it_woke_up(monkeypatch, tmp_path):
    shell = connector(KVConnectorRole.WORKER, table_dir=str(tmp_path))
    monkeypatch.setattr(shell, "_read", lambda _: {"device": "cpu"})
    shell.register_kv_caches({"layer": torch.zeros(8, 2, 4, 8)})
    first = shell.get_handshake_metadata()
    shell.unregister_kv_caches()
    shell.unregister_kv_caches()
    asleep = shell.get_handshake_metadata()
    shell.restore_kv_caches()
    shared = shell.get_handshake_metadata()
    shell.restore_kv_caches()
    again = shell.get_handshake_metadata()
    shell.shutdown()
    assert (first.status, asleep.status, shared.status) == ("ok", "the engine gave its KV memory up", "ok")
    assert asleep.memory is None
    assert again.memory == shared.memory is not None  # a second call changes nothing


def test_an_unknown_hash_is_refused_at_start():
    with pytest.raises(ValueError, match="xxh3_128, sha256"):
        connector(KVConnectorRole.SCHEDULER, hash="md5")


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({}, ""),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"enable_prefix_caching": False}, "prefix caching is off"),
        ({"calculate_kv_scales": True}, "KV scales"),
        ({"is_diffusion": True}, "diffusion"),
        ({"num_speculative_tokens": 2}, ""),
        ({"kinds": ("full", "state")}, ""),
        ({"kinds": ("full", "state"), "num_speculative_tokens": 2}, "speculative decoding"),
    ],
)
def test_an_engine_that_is_not_handled_is_refused_with_the_reason(about, said):
    usual = {"pipeline_parallel_size": 1, "enable_prefix_caching": True, "num_speculative_tokens": 0, "kinds": ("full",)}
    whole = SimpleNamespace(**(usual | about))
    groups = tuple(Group(kind, 16) for kind in whole.kinds)
    config = SimpleNamespace(
        parallel_config=whole, cache_config=whole, model_config=whole, num_speculative_tokens=whole.num_speculative_tokens
    )
    refusal = _refusal(config, groups)
    assert said in refusal
    assert bool(refusal) == bool(said)
