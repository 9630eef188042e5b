"""One request whose prefix comes from a disk, a peer's KV cache and host memory, one behind the other."""

from contextlib import closing

import numpy as np
import pytest

from engine.frame_tiers.disk.disk_store import DiskStore
from engine.frame_tiers.messages import Promote
from engine.host_process.kept_memory import VARIABLE, KeptMemories, encode_kept
from engine.tiers.slots import ALIGNED_BYTES
from tests.real.families.engines import Family, tokens
from tests.real.small_caches import chain_of
from tests.unit.engine.frame_tiers.node import Node
from transport.table.deliveries import FromSource
from transport.table.layout import CHECKSUM_BYTES

BLOCK, POOL = 32, 20
"""Tokens of a block, and blocks of an engine's KV cache; vLLM takes one for itself."""
HEAD, PEER, WHOLE = 3, 7, 10
"""Blocks of the prompt up to which the disk has it, the peer's KV cache, and host memory."""
SLOTS = 8
"""An idle engine stores ahead what a quarter of them holds: two blocks, which the peer's KV cache still has then."""


@pytest.fixture
def family(tmp_path):
    made = Family(tmp_path, "llama", max_model_len=512, num_gpu_blocks_override=POOL, block_size=BLOCK)
    made.tables.mkdir(mode=0o700)
    yield made
    made.close()


@pytest.fixture
def node(family, tmp_path):
    made = Node(family.tables, DiskStore(tmp_path / "disk", 1 << 30), staging_bytes=64 << 20)
    yield made
    made.close()


def slots_bytes(family: Family, name: str) -> int:
    """The host memory that has room for SLOTS blocks of an engine."""
    with closing(family.table(name)) as table:
        content = sum(layer.bytes for layer in table.memories[0].layers) + CHECKSUM_BYTES
    return SLOTS * (-(-content // ALIGNED_BYTES) * ALIGNED_BYTES)


def test_a_prefix_comes_from_disk_a_peer_and_host_memory_in_one_request(family, node):
    memories = KeptMemories(family.tables)
    family.start("b", environment={VARIABLE: encode_kept(memories.keep("b", 64 << 20))})
    family.start("a", environment={VARIABLE: encode_kept(memories.keep("a", slots_bytes(family, "b")))})
    ids = tokens(WHOLE * BLOCK + 3, 1)
    family.ask("b", ids[: HEAD * BLOCK + 3], source="")
    for seed in (2, 3):  # push it out of b's KV cache, and down to the disk
        family.ask("b", tokens(12 * BLOCK, seed), source="")
        node.down()
    cold = family.ask("a", ids, source="")
    unused = POOL - 1 - (WHOLE + 1)
    family.ask("a", tokens((unused + 1 + WHOLE - PEER) * BLOCK - 20, 4), source="")  # takes the prompt's last blocks
    with closing(family.table("a")) as peer, closing(family.table("a.host-memory")) as memory:
        keys = np.ascontiguousarray(chain_of(peer, ids)._chain)[:WHOLE]
        assert len(peer.longest_run(keys)) == PEER
        held = memory.look_up(keys)[0]
        assert held[PEER:].all()
        assert not held[HEAD]
        fingerprint = peer.fingerprint
    found = node.promote(Promote(1, fingerprint, keys[:HEAD].tobytes(), 0, 60.0))
    assert (found.source, found.tokens) == ("disk", HEAD * BLOCK)
    with family.counting("b") as counted:
        mixed = family.ask("b", ids, source="disk")
    came = (("disk", HEAD), ("a", PEER - HEAD), ("a.host-memory", WHOLE - PEER))
    kinds = ("tier_tokens_disk", "peer_tokens_shared_memory", "tier_tokens_host_memory")
    assert [counted[kind] for kind in kinds] == [blocks * BLOCK for _, blocks in came]
    assert (counted["imports"], counted["import_blocks"], counted["computed_tokens"]) == (3, WHOLE, 3)
    assert (counted["check_failures"], counted["fallbacks"], counted["table_errors"]) == (0, 0, 0)
    with closing(family.table("b")) as table:
        record = table.deliveries(0)[1][-1]
        assert record.sources() == tuple(FromSource(name, blocks * BLOCK) for name, blocks in came)
        assert {each.name: each.blocks for each in table.peers()} == dict(came)
    local = family.ask("b", ids, source="")
    assert (mixed.cached, local.cached) == (WHOLE * BLOCK, WHOLE * BLOCK)
    assert mixed.same_as(local)
    assert mixed.tokens == cold.tokens
