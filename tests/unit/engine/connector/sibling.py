"""Another connector beside ours in vLLM's MultiConnector, and an engine that has both."""

from dataclasses import dataclass, field
from typing import Any

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
    MultiKVConnectorMetadata,
    MultiKVConnectorWorkerMetadata,
)
from vllm.v1.outputs import KVConnectorOutput

from engine.connector.step_messages import StepMetadata
from tests.unit.engine.connector.test_imports_at_random import Computing
from tests.unit.engine.connector.test_in_vllms_scheduler import SIZE
from transport.keys import chain_keys, root_key


@dataclass(slots=True)
class Load:
    """What the sibling has of a request: its first `tokens`. It loads them in a request's first step, or, `waits`, within so
    many steps before that; only the first `good` of the blocks arrive. `blocks` are those that vLLM gave it."""

    tokens: int
    waits: int = 0
    good: int | None = None
    blocks: list[int] = field(default_factory=list)

    @property
    def failed(self) -> list[int]:
        return self.blocks[self.good :] if self.good is not None else []


@dataclass
class LoadsBegun(KVConnectorMetadata):
    loads: dict[str, Load]


class SiblingConnector(KVConnectorBase_V1, SupportsHMA):
    """Loads each request in `has` once."""

    def __init__(self, *given: Any, **about: Any) -> None:
        super().__init__(*given, **about)
        self.has: dict[str, Load] = {}
        self.begun: dict[str, Load] = {}

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        load = self.has.get(request.request_id)
        if load is None or load.tokens <= num_computed_tokens:
            return 0, False
        return load.tokens - num_computed_tokens, load.waits > 0

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        if num_external_tokens:
            load = self.begun[request.request_id] = self.has.pop(request.request_id)
            end = load.tokens // SIZE
            load.blocks = blocks.get_block_ids()[0][end - num_external_tokens // SIZE : end]

    def build_connector_meta(self, scheduler_output):
        begun, self.begun = self.begun, {}
        return LoadsBegun(begun)

    def request_finished_all_groups(self, request, block_ids):
        return False, None

    def start_load_kv(self, *_, **__): ...
    def wait_for_layer_load(self, *_): ...
    def save_kv_layer(self, *_, **__): ...
    def wait_for_save(self): ...


class BesideSibling(Computing):
    """An engine under MultiConnector. What its table offers is looked at whenever a worker has written."""

    ours_first = True
    failure_policy = "recompute"

    def __init__(self, *given, **about) -> None:
        self.loading: dict[str, Load] = {}
        self.written: dict[bytes, list[int]] = {}
        super().__init__(*given, **about)

    def transfer_config(self, **ours) -> KVTransferConfig:
        sibling = {
            "kv_connector": "SiblingConnector",
            "kv_connector_module_path": "tests.unit.engine.connector.sibling",
            "kv_role": "kv_both",
        }
        return KVTransferConfig(
            kv_connector="MultiConnector",
            kv_role="kv_both",
            kv_load_failure_policy=self.failure_policy,
            kv_connector_extra_config={"connectors": [ours, sibling] if self.ours_first else [sibling, ours]},
        )

    @property
    def ours(self) -> Any:
        return self.scheduler.connector.sub_connectors[0 if self.ours_first else 1]

    @property
    def sibling(self) -> SiblingConnector:
        return self.scheduler.connector.sub_connectors[1 if self.ours_first else 0]

    def add_ids(self, name, ids, answer, **hint):
        added = super().add_ids(name, ids, answer, **hint)
        tokens = self.tokens[name]
        for place, key in enumerate(chain_keys(root_key(self.table.fingerprint), tokens, SIZE)):
            self.written[bytes(key)] = [self.made(name, at) for at in range(place * SIZE, (place + 1) * SIZE)]
        return added

    def on_offer(self) -> dict[int, bytes]:
        """Return the key of each block that the table offers."""
        return {block: self.table.key(block) for block, state in enumerate(self.table.states().tolist()) if not state & 1}

    def look_at_offers(self) -> None:
        for block, key in self.on_offer().items():
            assert self.content[block] == self.written[key], (block, self.content[block])

    def _report(self, output) -> None:
        begun = self._of(output.kv_connector_metadata, ours=False).loads
        for load in begun.values():
            self.spoil(load.blocks)
        for name, load in begun.items():
            if not load.waits:
                self._fill(name, load)
        self.look_at_offers()
        super()._report(output)
        self.look_at_offers()

    def _look(self, read, written) -> None:
        """What was computed behind something wrong is wrong: then vLLM computes it again, or was told that it is."""
        for name, computed in read:
            end = computed + written[name]
            blocks = self.blocks[name]
            wrong = next((p for p in range(end) if self.content[blocks[p // SIZE]][p % SIZE] != self.made(name, p)), end)
            for place in range(max(wrong, computed), end):
                self.content[blocks[place // SIZE]][place % SIZE] = None
        self.look_at_offers()

    def _tell(self, step: MultiKVConnectorMetadata) -> KVConnectorOutput:
        ours = self._of(step, ours=True)
        told = super()._tell(ours)
        begun = self._of(step, ours=False).loads
        self.loading |= begun
        finished, failed = set(), set()
        for name, load in list(self.loading.items()):
            if load.waits > 1:
                load.waits -= 1
                continue
            del self.loading[name]
            failed.update(load.failed)
            if load.waits:
                self._fill(name, load)
                finished.add(name)
        report = told.kv_connector_worker_meta
        report.copied.update({store.slot: 1 for store in ours.stores.begun})
        both = (report, None) if self.ours_first else (None, report)
        return KVConnectorOutput(
            finished_recving=(told.finished_recving or set()) | finished or None,
            invalid_block_ids=told.invalid_block_ids | failed,
            kv_connector_worker_meta=MultiKVConnectorWorkerMetadata(metadata=both),
        )

    def _fill(self, name: str, load: Load) -> None:
        first = load.tokens // SIZE - len(load.blocks)
        for place, block in enumerate(load.blocks, first):
            if block not in load.failed:
                self.content[block] = [self.made(name, at) for at in range(place * SIZE, (place + 1) * SIZE)]

    def _of(self, metadata: MultiKVConnectorMetadata, *, ours: bool) -> Any:
        found = metadata.metadata[0 if self.ours_first is ours else 1]
        assert isinstance(found, StepMetadata if ours else LoadsBegun)
        return found
