"""The KV connector that stock vLLM loads: `kv_connector_module_path=engine.connector`, `kv_connector=PeerKVConnector`.

`kv_connector_extra_config`: `table_dir`, the directory of the node's block tables; `replica`, this engine's name in it; `hash`,
xxh3_128 or sha256; `namespace`, a word: engines with different ones exchange nothing; `pin_share_max`, the share of its blocks
that pins may hold; `tenant_share_max`, the share of host memory that a tenant has while others want room;
`host_memory_ttl_seconds`, how long a block stays there, 0: without end; `lossy`: by int8, rot4 or rot3 host memory codes blocks
of callers who accept loss. All have defaults, so plain vLLM servers started with this connector find each other without a
gateway.

No exception leaves a method of this class: vLLM would end the engine. A fault is logged and counted; from then on the connector
imports and offers nothing.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from engine.connector import compat, fingerprint_fields
from engine.connector.pins import unpin_before_reset
from engine.connector.scheduler import CacheBlocks, SchedulerHalf
from engine.connector.step_messages import Handshake, StepMetadata, WorkerReport
from engine.connector.vllm_groups import GroupNotHandled, ModelGroups, model_groups
from engine.connector.worker import WorkerHalf
from engine.host_process.kept_memory import VARIABLE, KeptMemory, decode_kept
from engine.tiers.ages import TTL_SECONDS_MAX
from engine.tiers.only_writer import become_only_writer
from engine.tiers.self_test import FAILED
from engine.tiers.slots import Slots
from transport.errors import TransportError
from transport.fingerprint import fingerprint_digest
from transport.groups import Group
from transport.keys import HASH_NAMES
from transport.table.directory import TableDirectory, sweep
from transport.table.kept_table import KeptTable
from transport.table.layout import BLOCKS_MAX, Description, SlotCodec
from transport.table.tiers import host_memory_of
from transport.table.writer import TableWriter

_logger = logging.getLogger("vllm.peerkv")
_Result = TypeVar("_Result")
_PR_SET_PDEATHSIG = 1
_ANSWERED = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_REPETITION")
_FAILS_REQUESTS = (
    "vLLM would answer a request whose import failed with an error: "
    'beside "kv_connector": "MultiConnector" add "kv_load_failure_policy": "recompute"'
)
PIN_SHARE_MAX = 0.25
TENANT_SHARE_MAX = 0.5
_SLOT_CODECS: Mapping[str, SlotCodec] = {name: name for name in get_args(SlotCodec)}


class PeerKVConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """The shell of both halves: passes vLLM's calls on and keeps faults inside."""

    _cache_hit_source = compat.PEER_HITS

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._table_dir = Path(str(extra.get("table_dir") or f"/dev/shm/peerkv-{os.geteuid()}/default"))
        self._replica = str(extra.get("replica") or f"vllm-{os.getpid()}")
        self._hash_name = str(extra.get("hash") or "xxh3_128")
        self._namespace = str(extra.get("namespace") or "")
        self._pin_share_max = float(extra.get("pin_share_max", PIN_SHARE_MAX))
        self._tenant_share_max = float(extra.get("tenant_share_max", TENANT_SHARE_MAX))
        self._ttl_seconds = float(extra.get("host_memory_ttl_seconds", 0.0))
        self._lossy = str(extra.get("lossy") or "")
        if self._hash_name not in HASH_NAMES:
            raise ValueError(f"kv_connector_extra_config: hash is {self._hash_name!r}, not one of {', '.join(HASH_NAMES)}")
        if not 0 <= self._pin_share_max < 1:
            raise ValueError(f"kv_connector_extra_config: pin_share_max is {self._pin_share_max}, not from 0 to below 1")
        if not 0 < self._tenant_share_max <= 1:
            raise ValueError(f"kv_connector_extra_config: tenant_share_max is {self._tenant_share_max}, not above 0 to 1")
        if not 0 <= self._ttl_seconds <= TTL_SECONDS_MAX:
            raise ValueError(
                f"kv_connector_extra_config: host_memory_ttl_seconds is {self._ttl_seconds}, not from 0 to {TTL_SECONDS_MAX}"
            )
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._fields: dict[str, str] = {}
        self._kv_caches: dict[str, Any] = {}
        self._groups: ModelGroups | None = None
        self._bound: Any = None
        self._cache_blocks: CacheBlocks | None = None
        # a failed import must be computed, not reported to the client; vLLM reads this after it made the connector, unless that
        # is MultiConnector's: then get_handshake_metadata finds out
        vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
        _end_with_parent()
        self._kept = _kept_memory()
        self._writer_lock = -1
        if role is KVConnectorRole.WORKER:
            ranks = int(vllm_config.parallel_config.tensor_parallel_size)
            self._worker = WorkerHalf(
                self._table_dir, self._replica, int(vllm_config.parallel_config.rank) % ranks, self._kept, ranks
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache promises nothing: a request that is preempted may finish without handing its KV to anyone."""
        return False

    # Scheduler

    @property
    def supports_divergent_local_hybrid_hits(self) -> bool:
        """An import may begin where full attention's blocks end here: it brings the state that is missing there."""
        return self._groups is not None and self._groups.restores_states

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """All groups: vLLM must not zero what an import writes."""
        return self._groups.places if self._groups is not None and not self._groups.plain else ()

    def set_xfer_handshake_metadata(self, metadata: dict[int, Handshake]) -> None:
        """Create the block table, now that the workers have told where their KV memory is.

        Called again when vLLM wakes up: what was on offer before it slept is gone, so its table ends and a new epoch begins.
        """
        self._guard("create the block table", lambda: self._create_table(list(metadata.values())), None)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Handshake]) -> None:
        """Like the above; several pipeline stages are refused there."""
        self._guard("create the block table", lambda: self._create_table(list(metadata.values())), None)

    def _create_table(self, handshakes: list[Handshake]) -> None:
        former, self._scheduler = self._scheduler, None
        if former is not None:
            former.close()
        config, refusal = self._vllm_config, _foreign(handshakes)
        handshakes = [shake for shake in handshakes if isinstance(shake, Handshake)]
        block_size = int(config.cache_config.block_size)
        try:
            groups = model_groups(self._kv_cache_config.kv_cache_groups)
        except GroupNotHandled as error:
            groups, refusal = ModelGroups((Group("full", block_size),)), refusal or str(error)
        fields = fingerprint_fields.scheduler_fields(config, groups.groups, self._hash_name)
        unread = (
            "the model's weight files were not found, so it is unknown whether a peer has the same"
            if not fields["weights"]
            else ""
        )
        status = (
            refusal
            or _refusal(config, groups.groups)
            or unread
            or next((h.status for h in handshakes if h.status != "ok"), "ok")
        )
        fields["namespace"] = self._namespace
        for shake in handshakes:
            fields.update(shake.fields)
        memories = tuple(sorted((h.memory for h in handshakes if h.memory), key=lambda memory: memory.rank))
        transport = memories[0].transport if memories else "none"
        sweep(self._table_dir, time.time())
        description = Description(
            self._replica, os.getpid(), self._hash_name, transport, status, fields, memories, groups.groups
        )
        self._groups = groups
        self._scheduler = SchedulerHalf(
            TableWriter(self._table_dir, description, groups.unit, int(self._kv_cache_config.num_blocks)),
            TableDirectory(self._table_dir, self._replica),
            fingerprint_digest(fields),
            fields,
            groups=groups,
            hash_name=self._hash_name,
            transport=transport,
            status=status,
            ranks=len(handshakes),
            pin_share_max=self._pin_share_max,
            tier=self._open_tier(handshakes, status, fields, groups),
            tenant_share_max=self._tenant_share_max,
            host_memory_ttl_seconds=self._ttl_seconds,
        )
        if self._bound is not None:
            self._scheduler.bind_pool(self._bound)
        if self._cache_blocks is not None:
            self._scheduler.bind_cache(self._cache_blocks)
        failed = sum(str(shake.host_memory).startswith(FAILED) for shake in handshakes)
        self._scheduler.table.count("table_errors", failed)
        level = logging.INFO if status == "ok" else logging.WARNING
        _logger.log(level, "%s shares KV blocks under %s: %s", self._replica, self._table_dir, status)

    def _open_tier(
        self, handshakes: list[Handshake], status: str, fields: dict[str, str], groups: ModelGroups
    ) -> KeptTable | None:
        """Return the table of this replica's host memory, with what it still offers; None if there is no such memory."""
        if self._kept is None:
            return None
        slots = [shake.host_memory for shake in handshakes if isinstance(shake.host_memory, Slots)]
        transport = next((shake.memory.transport for shake in handshakes if shake.memory), "none")
        why = status if status != "ok" else next((str(s.host_memory) for s in handshakes if s.host_memory not in slots), "")
        try:
            if not why:
                return self._create_tier(self._kept, slots, transport, fields, groups)
        except (TransportError, OSError) as error:
            why = str(error)
        _logger.warning("%s stores nothing in host memory: %s", self._replica, why)
        return None

    def _create_tier(
        self, kept: KeptMemory, slots: list[Slots], transport: str, fields: dict[str, str], groups: ModelGroups
    ) -> KeptTable:
        memories = tuple(sorted((each.memory for each in slots), key=lambda memory: memory.rank))
        name = host_memory_of(self._replica)
        description = Description(name, kept.pid, self._hash_name, transport, "ok", fields, memories, groups.groups)
        count = min(BLOCKS_MAX, *(each.count for each in slots))
        if self._writer_lock < 0:
            self._writer_lock = become_only_writer(kept.region)
        second_name = Path(kept.second_name) if kept.second_name else None
        table = KeptTable(self._table_dir, description, groups.unit, count, Path(kept.draft), second_name)
        _logger.info("%s stores up to %d blocks in host memory, %d are there", self._replica, count, table.valid())
        return table

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        self._cache_blocks = kv_cache_manager.cache_blocks
        super().bind_kv_cache_manager(kv_cache_manager)  # which binds the block pool

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._bound = gpu_block_pool
        self._guard("make way for resets", lambda: unpin_before_reset(gpu_block_pool, self._unpin), None)
        if self._scheduler is not None:
            self._guard("bind the block pool", lambda: self._half.bind_pool(gpu_block_pool), None)
            if self._cache_blocks is not None:
                self._half.bind_cache(self._cache_blocks)

    def _unpin(self) -> None:
        if self._scheduler is not None:
            self._guard("unpin", self._half.unpin, None)

    def on_new_request(self, request: Any) -> None:
        if self._scheduler is None:
            return
        try:
            self._half.arrived(request)
        except Exception as error:  # noqa: BLE001 - one odd request is served all the same
            _logger.warning("could not record a request: %r", error)
            self._half.table.count("table_errors")

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        if self._scheduler is None:
            return 0, False
        try:
            tokens = self._half.match(request, num_computed_tokens)
        except Exception as error:  # noqa: BLE001 - one odd request is a miss, and no reason to stop the exchange
            _logger.warning("could not look up a prefix: %r", error)
            self._half.table.count("table_errors")
            tokens = 0
        return tokens, tokens > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is None:
            return
        if not num_external_tokens:
            self._scheduler.admitted(request.request_id, blocks)
        else:
            half, block_ids = self._scheduler, blocks.get_block_ids()
            done = self._guard("plan an import", lambda: half.allocated(request, block_ids, num_external_tokens), None)
            if not done:  # vLLM waits for every import that it allocated for
                self._guard("give up an import", lambda: half.give_up(request.request_id, block_ids, num_external_tokens), None)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        if self._scheduler is None:
            return StepMetadata(0)
        half = self._scheduler
        meta = self._guard("close a step", lambda: half.step(scheduler_output), None)
        return meta or StepMetadata(0, half.take_starting())

    def update_connector_output(self, connector_output: Any) -> None:
        half = self._scheduler
        if half is None:
            return
        meta = connector_output.kv_connector_worker_meta
        report = meta if isinstance(meta, WorkerReport) else None
        finished, invalid = connector_output.finished_recving, connector_output.invalid_block_ids
        if finished or invalid:
            self._guard("note what was loaded", lambda: half.transferred(finished or (), invalid or set(), report), None)
        if report is not None:
            self._guard("take a report", lambda: half.report(report), None)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is not None:
            half = self._scheduler
            self._guard(
                "forget a request",
                lambda: half.finished(request.request_id, aborted=str(request.status) not in _ANSWERED),
                None,
            )
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._guard("reset", self._half.reset, None)
        return True

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        worker = self._worker
        if worker is None:
            return
        self._kv_caches = kv_caches
        num_blocks = int(self._kv_cache_config.num_blocks)
        self._fields = self._guard("read the KV layout", lambda: self._read(kv_caches), {})
        if self._fields:
            codec = _SLOT_CODECS.get(self._lossy)
            lossy = self._fields | self._kv_dtype() if codec is not None else None
            about = num_blocks, self._layer_groups(), lossy, codec or "int8"
            self._guard("share the KV memory", lambda: worker.register(kv_caches, *about), None)

    def _kv_dtype(self) -> dict[str, str]:
        return {"kv dtype": str(self._vllm_config.cache_config.cache_dtype)}

    def _read(self, kv_caches: dict[str, Any]) -> dict[str, str]:
        return fingerprint_fields.worker_fields(self._vllm_config, kv_caches, self._layer_groups())

    def _layer_groups(self) -> Mapping[str, int] | None:
        """Return the KV cache group of each layer; None if the groups are not handled, and nothing is exchanged."""
        try:
            return model_groups(self._kv_cache_config.kv_cache_groups).layers
        except GroupNotHandled:
            return None

    def unregister_kv_caches(self) -> None:
        """Called before vLLM 0.33 sleeps, after it reset its prefix cache: the memory will be gone. Idempotent."""
        if self._worker is not None:
            self._guard("let go of the KV memory", self._worker.unmap, None)

    def restore_kv_caches(self) -> None:
        """Called when vLLM 0.33 woke up: share the memory that now lies behind the same tensors. Idempotent.

        vLLM then hands the workers' handshakes to the scheduler's half once more.
        """
        if self._worker is not None and self._worker.unmapped:
            self.register_kv_caches(self._kv_caches)

    def get_handshake_metadata(self) -> Handshake | None:
        if self._worker is None:
            return None
        shake = self._worker.handshake(self._fields)
        fails = self._guard("read vLLM's configuration", self._fails_requests, True)
        return replace(shake, status=_FAILS_REQUESTS) if fails and shake.status == "ok" else shake

    def _fails_requests(self) -> bool:
        return str(compat.transfer_config(self).kv_load_failure_policy) != "recompute"

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Called before each step that computes: what it overwrites is stored first."""
        if self._worker is not None and isinstance(kv_connector_metadata, StepMetadata):
            self._worker.store(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        worker, metadata = self._worker, self._connector_metadata
        if worker is not None and isinstance(metadata, StepMetadata):
            self._guard("begin an import", lambda: worker.start(metadata), None)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        worker = self._worker
        if worker is None:
            return KVConnectorTransferResults()
        ended = self._guard("poll imports", worker.poll, None)
        if ended is None:
            ended = worker.fail_all("a fault in the transport")
        return KVConnectorTransferResults(finished_recving=ended, failed_recving=worker.take_failed())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_load_errors() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> WorkerReport | None:
        return self._worker.take_report() if self._worker is not None else None

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Imports end before a request is scheduled: there is nothing to wait for."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are read where they lie: there is nothing to save."""

    def wait_for_save(self) -> None:
        """Blocks are read where they lie: there is nothing to wait for."""

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._guard("close the block table", self._half.close, None)
            self._scheduler = None
        if self._worker is not None:
            self._guard("close peers", self._worker.close, None)

    # Faults

    @property
    def _half(self) -> SchedulerHalf:
        assert self._scheduler is not None
        return self._scheduler

    def _guard(self, what: str, call: Callable[[], _Result], otherwise: _Result) -> _Result:
        """Do `call`; on any fault log it, withdraw what we offer, and return `otherwise`."""
        try:
            return call()
        except Exception as error:  # one that left here would end the engine
            level = logging.WARNING if isinstance(error, TransportError) else logging.ERROR
            _logger.log(level, "could not %s: %s; this replica exchanges no more blocks", what, error, exc_info=True)
            if self._scheduler is not None:
                self._withdraw(self._scheduler)
            return otherwise

    def _withdraw(self, half: SchedulerHalf) -> None:
        """Withdraw what we offer; if even that fails, end the table's epoch: to its readers the owner is dead then."""
        try:
            half.withdraw()
        except Exception as error:  # noqa: BLE001 - one that left here would end the engine
            _logger.error("could not withdraw the block table: %s; it ends", error)
            half.table.end()


def _refusal(vllm_config: Any, groups: tuple[Group, ...]) -> str:
    """Return why this model's KV is not exchanged, "" if it is."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    for name in ("pipeline", "decode_context", "prefill_context"):
        if int(getattr(parallel, f"{name}_parallel_size", 1) or 1) > 1:
            return f"{name.replace('_', ' ')} parallelism is not handled yet"
    if not cache.enable_prefix_caching:
        return "prefix caching is off"  # multimodal items have no identity of their own then
    if getattr(cache, "calculate_kv_scales", False):
        return "KV scales are calculated while running: two replicas cannot know whether theirs are equal"
    if getattr(vllm_config.model_config, "is_diffusion", False):
        return "diffusion models are not handled yet"
    if vllm_config.num_speculative_tokens and any(group.kind == "state" for group in groups):
        # vLLM (v1/worker/gpu/model_runner.py, sample_tokens) lets go of a step's output before postprocess_sampled writes the
        # state that accepted drafts went past, so the step may be reported while that is still being written
        return "states with speculative decoding are not handled yet"
    return ""


def _foreign(handshakes: list[Handshake]) -> str:
    """Return why nothing is exchanged if these are another connector's: MultiConnector gives all of its connectors the workers'
    handshakes of the first one that has any."""
    others = {type(shake).__name__ for shake in handshakes if not isinstance(shake, Handshake)}
    named = ", ".join(sorted(others))
    return f"the workers' handshake is another connector's ({named}): name PeerKVConnector before it" if others else ""


def _kept_memory() -> KeptMemory | None:
    """Return what the replica host keeps for this replica; None for a server that has none, or was not started by a host."""
    told = os.environ.get(VARIABLE, "")
    if not told:
        return None
    try:
        return decode_kept(told)
    except msgspec.MsgspecError as error:
        _logger.warning("no host memory: %s: %s", VARIABLE, error)
        return None


def _end_with_parent() -> None:
    """In an engine process that a server started: die with it, so that a killed server leaves no engine behind."""
    if multiprocessing.parent_process() is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
