"""The connector's worker half: one rank's KV memory, and the imports under way."""

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.connector.compat import allow_amx
from engine.connector.jobs import Jobs
from engine.connector.step_messages import Handshake, ImportReport, StepMetadata, WorkerReport
from engine.host_process.kept_memory import KeptMemory
from engine.tiers.slot_writer import SlotWriter
from engine.tiers.slots import NoSlots, Slots, cut
from engine.tiers.stores import Writer
from transport.backends.base import ImportJob, ImportResult, Transport
from transport.backends.shared_memory import SharedMemoryTransport
from transport.errors import MemoryUnreachable, TransportError
from transport.frames import layouts
from transport.frames.codecs import compile_codec
from transport.frames.shape import Shape
from transport.node.fetches import Fetches, StagedReader, staging_of
from transport.node.messages import NodeError
from transport.node.names import node_of
from transport.table.directory import TableDirectory
from transport.table.layout import SlotCodec

_logger = logging.getLogger(__name__)

WAIT_SECONDS = 0.0003
"""About as long as a step that computes nothing takes."""
WATCH_SECONDS = 0.5
"""How often owners are looked for: of those that ended the memory is closed, which stays allocated for as long as it is mapped
here, and of those that came it is opened."""


class WorkerHalf:
    """Begins and polls imports, and stores blocks in the host memory `kept` for the `ranks` of this replica, if any is.

    Every job that came in is reported once, whatever happens: vLLM keeps a request waiting until then.
    """

    def __init__(self, table_dir: Path, replica: str, rank: int, kept: KeptMemory | None = None, ranks: int = 1) -> None:
        self._kept = kept
        self._new = kept is not None and kept.new
        self._ranks = ranks
        self._slots: Slots | str = ""
        self._slot_writer: Writer | None = None
        self._peers = TableDirectory(table_dir, replica)
        self._rank = rank
        self._fetches = Fetches(table_dir, rank)
        self._transport: Transport | None = None
        self._status = "the engine registered no KV cache"
        self._ended: dict[str, ImportReport] = {}
        self._jobs = Jobs()
        self._load_errors: set[int] = set()
        self._failed: set[str] = set()
        self._step = 0
        self._computes = True
        self._unmapped = False
        self._lock = threading.Lock()
        self._watcher: threading.Thread | None = None
        self._closing = threading.Event()

    def register(
        self,
        kv_caches: Mapping[str, Any],
        num_blocks: int,
        groups: Mapping[str, int] | None = None,
        lossy: Mapping[str, str] | None = None,
        codec: SlotCodec = "int8",
    ) -> None:
        """Make the KV tensors readable for peers by the transport that fits them; `groups` tells each layer's group.

        `lossy`, fields of the fingerprint, has host memory code blocks of callers who accept loss by `codec`, if they can be.

        Again after `unmap`: the scheduler's half then begins anew as well, and so do the numbers of its steps.
        """
        self._unmapped, self._step = False, 0
        try:
            self._transport = _transport(kv_caches, num_blocks, self._rank, groups)
        except (TransportError, OSError, RuntimeError, ImportError) as error:
            self._status = f"KV memory cannot be shared: {error}"
            _logger.warning("%s", self._status)
            return
        self._status = "ok"
        if self._kept is not None:
            self._open_slots(self._transport, self._kept, num_blocks, lossy, codec)
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="peerkv-watch", daemon=True)
            self._watcher.start()

    def handshake(self, fields: dict[str, str]) -> Handshake:
        """Return what the scheduler's half has to know of this rank."""
        return Handshake(self._transport.memory() if self._transport else None, self._status, fields, self._slots)

    def _open_slots(
        self, transport: Transport, kept: KeptMemory, num_blocks: int, lossy: Mapping[str, str] | None, codec: SlotCodec
    ) -> None:
        try:
            shape = _coded_shape(transport, lossy, codec) if lossy is not None else None
            slots = cut(kept.region, transport.memory(), self._ranks, shape, codec)
            self._slot_writer = _slot_writer(transport, slots, num_blocks - 1 if self._new else None)
            self._slots, self._new = slots, False  # from now on there may be something on offer in it, as after a sleep
        except (NoSlots, TransportError, OSError, ValueError) as error:
            self._slots = str(error)

    def store(self, metadata: StepMetadata) -> None:
        """Copy into host memory what this step is about to overwrite, and go on with the rest beside it.

        Called before the engine enqueues the step.
        """
        if metadata.imports and self._transport is not None:
            self._transport.before_step()
        if self._slot_writer is None:
            return
        try:
            self._slot_writer.begin(metadata.stores)
        except Exception as error:  # noqa: BLE001 - without host memory the engine serves and exchanges as before
            _logger.error("nothing is stored in host memory any more: %r", error)
            self._end_stores()

    def _end_stores(self) -> None:
        writer, self._slot_writer = self._slot_writer, None
        if writer is not None:
            writer.close()

    def start(self, metadata: StepMetadata) -> None:
        """Begin the imports of a step."""
        self._step, self._computes = max(self._step, metadata.step), metadata.computes
        fresh = self._jobs.begin(metadata.imports)
        try:
            for job in fresh:
                with self._lock:
                    try:
                        self._start(job, gently=metadata.computes)
                    except MemoryUnreachable as error:
                        self._fail(job, str(error))
                    except NodeError as error:
                        self._fail(job, str(error), early=True)
        except Exception as error:
            self.fail_all(f"a fault in the transport: {error!r}")
            raise

    def _start(self, job: ImportJob, *, gently: bool) -> None:
        reader = self._peers.tables().get(job.source)
        if self._transport is None or reader is None or reader.epoch != job.epoch:
            self._fail(job, f"{job.source or 'no source'} is gone", early=True)  # a mirror comes back in the same epoch
        elif node_of(job.source):
            self._fetches.begin(job, reader)
        else:
            self._transport.start(job, reader, gently=gently)

    def poll(self) -> set[str]:
        """Return the ids of the requests whose import ended since the last call."""
        if self._transport is not None and (self._transport.pending() or self._fetches.pending()):
            with self._lock:
                for job, source, reason in self._fetches.poll() if self._fetches.pending() else ():
                    self._fetched(self._transport, job, source, reason)
                for result in self._poll(self._transport):
                    self._fetches.release(result.job.id)
                    self._end(result)
        return set(self._ended)

    def _poll(self, transport: Transport) -> list[ImportResult]:
        """Poll; in a step that computes nothing wait for a copy that is about to end: vLLM hears of that only with a step."""
        results, until = transport.poll(), time.monotonic() + WAIT_SECONDS
        while not (results or self._computes) and transport.ends_within(WAIT_SECONDS) and time.monotonic() < until:
            results = transport.poll()
        return results

    def _fetched(self, transport: Transport, job: ImportJob, source: StagedReader | None, reason: str) -> None:
        """Copy what this node's agent fetched from another node; what the other node failed to give may work the next time."""
        if source is None:
            self._fail(job, reason, early=True)
            return
        if reason:
            _logger.info("of %s not all came for %s: %s", job.source, job.request_id, reason)
        try:
            transport.start(job, source, gently=True)
        except MemoryUnreachable as error:
            self._fetches.release(job.id)
            self._fail(job, str(error))

    def fail_all(self, reason: str) -> set[str]:
        """Give up the transport and every import under way, once nothing writes any more; return the ids of all that ended."""
        self._end_stores()
        with self._lock:
            self._fetches.close()
            broken, self._transport = self._transport, None
            if broken is not None:
                try:
                    broken.close()
                except Exception as error:  # noqa: BLE001 - whatever broke it must not keep imports from being reported
                    _logger.error("closing the transport: %s", error)
        for job in self._jobs.under_way():
            self._fail(job, reason)
        return set(self._ended)

    @property
    def unmapped(self) -> bool:
        """Whether the KV memory was given up, and not registered again since."""
        return self._unmapped

    def unmap(self) -> None:
        """The KV memory is about to go: share and import nothing until it is registered again."""
        self._unmapped, self._status = True, "the engine gave its KV memory up"
        self.fail_all("the engine gave its KV memory up")

    def take_load_errors(self) -> set[int]:
        """Return the blocks that must be recomputed, once."""
        errors, self._load_errors = self._load_errors, set()
        return errors

    def take_failed(self) -> set[str]:
        """Return the requests that must be recomputed, once: of models with several KV cache groups, whose blocks vLLM does not
        tell apart in an error."""
        failed, self._failed = self._failed, set()
        return failed

    def take_report(self) -> WorkerReport:
        """Return what the scheduler's half has to know of this step, once."""
        ended, self._ended = self._ended, {}
        writer = self._slot_writer
        copied, lost = (writer.take_copied(), writer.take_lost()) if writer is not None else ([], [])
        done = dict.fromkeys(copied + lost, 1)
        checked = self._jobs.checked(self._transport.checked() if self._transport is not None else {})
        return WorkerReport(self._step, ended, dict.fromkeys(ended, 1), self._unmapped, done, frozenset(lost), checked)

    def close(self) -> None:
        """Release peers' memory and tables."""
        self._closing.set()
        self._end_stores()
        with self._lock:
            self._fetches.close()
            if self._transport is not None:
                self._transport.close()
            self._peers.close()

    def _watch(self) -> None:
        while not self._closing.wait(WATCH_SECONDS):
            try:
                with self._lock:
                    if self._transport is not None and not self._closing.is_set():
                        self._meet(self._transport)
            except Exception as error:  # noqa: BLE001 - without this thread the dead would keep their memory
                _logger.error("looking for owners that ended: %r", error)

    def _meet(self, transport: Transport) -> None:
        """Let go of owners that ended, and open the memory of those that came."""
        peers = self._peers.tables()
        transport.retain({(name, table.epoch) for name, table in peers.items()})
        for table in peers.values():
            if (table.status, table.transport) != ("ok", transport.name):
                continue
            if not node_of(table.name):
                transport.prepare(table)
            elif (staged := staging_of(table, self._rank)) is not None:
                transport.prepare(staged)

    def _end(self, result: ImportResult) -> None:
        job, failed = result.job, frozenset(result.failed_blocks)
        report = ImportReport(failed, result.stale_blocks, result.bytes, result.nanoseconds, result.reason, result.early)
        whole = self._jobs.end(job, report)
        if whole is None:
            return
        if not job.counts:
            self._load_errors.update(*(each.failed_blocks for each in whole.by_source()))
        elif result.reason or whole.reason:
            self._failed.add(job.request_id)
        self._ended[job.request_id] = whole

    def _fail(self, job: ImportJob, reason: str, *, early: bool = False) -> None:
        self._end(ImportResult(job, tuple(job.target_blocks.tolist()), 0, 0, 0, reason, early))


def _transport(kv_caches: Mapping[str, Any], num_blocks: int, rank: int, groups: Mapping[str, int] | None = None) -> Transport:
    """Return the transport that fits the device of the KV tensors. Raises MemoryUnreachable if none does."""
    devices = {str(tensor.device.type) for tensor in kv_caches.values()}
    if devices == {"cpu"}:
        allow_amx()
        return SharedMemoryTransport(kv_caches, num_blocks, rank, groups)
    if devices == {"cuda"}:
        from transport.backends.cuda_ipc import CudaIpcTransport

        return CudaIpcTransport(kv_caches, num_blocks, rank, groups)
    raise MemoryUnreachable(f"no transport for KV memory on {', '.join(sorted(devices)) or 'no device'}")


def _coded_shape(transport: Transport, fields: Mapping[str, str], codec: SlotCodec) -> Shape | None:
    """Return the shape of blocks that can be coded, ready to be so; None if all are kept as they are."""
    layers = transport.memory().layers
    alike = len({(layer.group, layer.bytes) for layer in layers}) == 1
    shape = layouts.told(fields, layers[0].bytes, len(layers)) if alike else None
    try:
        if shape is not None and _codes(transport, shape, codec):
            return shape
    except ImportError as error:
        _logger.warning("host memory codes no blocks: %s", error)
        return None
    _logger.info("host memory keeps all blocks as they are: their layout is not one that %s codes here", codec)
    return None


def _codes(transport: Transport, shape: Shape, codec: SlotCodec) -> bool:
    if isinstance(transport, SharedMemoryTransport):
        compile_codec(codec)
        return True
    from transport.backends.cuda_ipc import CudaIpcTransport

    return isinstance(transport, CudaIpcTransport) and transport.codes(shape, codec)


def _slot_writer(transport: Transport, slots: Slots, unused: int | None) -> Writer:
    """Return what copies blocks of the transport's own memory into slots; these are tried out if they are new, by way of the
    first one and a block that is not used yet, `unused`. Raises MemoryUnreachable."""
    if isinstance(transport, SharedMemoryTransport):
        writer = SlotWriter(transport, slots)
        if unused is not None:
            writer.try_out(0, unused)
        return writer
    from engine.tiers.cuda_slot_writer import CudaSlotWriter
    from transport.backends.cuda_ipc import CudaIpcTransport

    assert isinstance(transport, CudaIpcTransport)
    return CudaSlotWriter(transport, slots, 0 if unused is not None else None)
