"""A scheduler half, and the small part of vLLM's scheduler that drives it."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from engine.connector.scheduler import SchedulerHalf
from engine.connector.step_messages import ImportReport, StepMetadata, WorkerReport
from engine.connector.vllm_groups import ModelGroups
from tests.unit.transport.table_fixtures import FIELDS, description
from transport.fingerprint import fingerprint_digest
from transport.groups import Group
from transport.keys import chain_keys, root_key
from transport.table.directory import TableDirectory
from transport.table.reader import TableReader
from transport.table.writer import TableWriter

SIZE = 4
PLAIN = ModelGroups((Group("full", SIZE),))
FINGERPRINT = fingerprint_digest(FIELDS)


@dataclass
class Request:
    """As much of vLLM's request as the connector reads."""

    request_id: str
    all_token_ids: list[int]
    kv_transfer_params: dict | None = None
    cache_salt: str | None = None
    lora_request: object = None
    mm_features: list = field(default_factory=list)
    skip_reading_prefix_cache: bool = False
    pooling_params: object = None
    prompt_embeds: object = None
    num_prompt_tokens: int = 0
    status: str = "WAITING_FOR_REMOTE_KVS"

    def __post_init__(self):
        self.num_prompt_tokens = len(self.all_token_ids)

    @property
    def num_tokens(self):
        return len(self.all_token_ids)


def by_group(ids):
    return tuple(map(list, ids)) if isinstance(ids, tuple) else (list(ids),)


def keys_of(tokens, salt="", lora=""):
    return chain_keys(root_key(FINGERPRINT, salt, lora), tokens, SIZE)


class Replica:
    """A scheduler half and the small part of vLLM's scheduler that drives it."""

    def __init__(self, path: Path, name, blocks=32, status="ok", groups=PLAIN, **about):
        self.half = SchedulerHalf(
            TableWriter(path, description(name, status=status), groups.unit, blocks),
            TableDirectory(path, name),
            FINGERPRINT,
            dict(FIELDS),
            groups=groups,
            hash_name="xxh3_128",
            transport="shared_memory",
            status=status,
            **about,
        )
        self.reader = TableReader(self.half.table.path)
        self.held_blocks: dict[str, list[list[int]]] = {}

    def schedule(self, new=(), cached=(), resumed=(), preempted=(), states=None, copies=(), zeroed=()) -> StepMetadata:
        """`new`: (request, block ids, computed, scheduled); `cached`: (request, added blocks, computed, scheduled).

        Block ids are a list, or a tuple of one for each group; `states`: {request id: [(group, block, tokens)]}.
        """
        for request, ids, _, _ in [*new, *cached]:
            self._give(request.request_id, by_group(ids or []))
        output = SimpleNamespace(
            num_scheduled_tokens={r.request_id: n for r, _, _, n in [*new, *cached]},
            scheduled_new_reqs=[
                SimpleNamespace(req_id=r.request_id, block_ids=by_group(ids), num_computed_tokens=computed)
                for r, ids, computed, _ in new
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[r.request_id for r, _, _, _ in cached],
                resumed_req_ids=set(resumed),
                new_block_ids=[by_group(ids) if ids else None for _, ids, _, _ in cached],
                num_computed_tokens=[computed for _, _, computed, _ in cached],
            ),
            preempted_req_ids=set(preempted),
            kv_cache_block_copies=[SimpleNamespace(dst_block_id=block) for block in copies],
            new_block_ids_to_zero=list(zeroed),
            kv_connector_block_state=SimpleNamespace(boundary_state_offloads=states or {}, get_block_ids=self.held_blocks.get),
        )
        return self.half.step(output)

    def _give(self, request_id, given):
        """Note what vLLM's block tables say: a block belongs to whom it was given last."""
        taken = {block for blocks in given for block in blocks}
        for held in self.held_blocks.values():
            for blocks in held:
                blocks[:] = [0 if block in taken else block for block in blocks]
        held = self.held_blocks.setdefault(request_id, [[] for _ in given])
        for blocks, more in zip(held, given, strict=False):
            blocks += more

    def done(self, step, **imports):
        self.half.report(WorkerReport(step, imports, dict.fromkeys(imports, 1)))

    def prefill(self, request, ids, computed=0):
        """Schedule a prompt whole, sample one token, report the step."""
        self.half.match(request, computed)
        meta = self.schedule(new=[(request, ids, computed, request.num_tokens - computed)])
        request.all_token_ids.append(1)
        self.done(meta.step)

    def imports_and_computes(self, request, ids):
        """Import what a peer has of a prompt, compute the rest, sample one token, report the steps."""
        tokens, meta = import_all(self, request, ids)
        self.done(meta.step, **{request.request_id: report()})
        run_on(self, request, ids, tokens)

    def held(self, tokens, salt="", lora=""):
        return self.reader.longest_run(keys_of(tokens, salt, lora)).block_ids.tolist()

    def counted(self):
        return {name: value for name, value in self.reader.counters().items() if value}


PROMPT = list(range(100, 114))  # three full blocks and two tokens more


def report(failed=(), stale=0):
    return ImportReport(frozenset(failed), stale, 1000, 500, "changed" if failed else "")


def run_on(b, request, ids, computed):
    """Schedule the rest of a prompt after its import, sample one token, report the step."""
    meta = b.schedule(new=[(request, ids, computed, request.num_tokens - computed)])
    request.all_token_ids.append(1)
    b.done(meta.step)


def import_all(b, request, ids, local=0):
    tokens = b.half.match(request, local)
    b.half.allocated(request, by_group(ids), tokens)
    meta = b.schedule()
    return tokens, meta
