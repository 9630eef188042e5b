"""Pins hold in host memory and on the disk, and one tenant's flood leaves another its share there, in a real churn."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from engine.frame_tiers.archive import frames_on_disk, on_disk
from engine.frame_tiers.disk.segment import HEAD
from engine.frame_tiers.store import frame_tenant
from gateway.tenants.salts import tenant_salt
from tests.real.conftest import CONFIG, ONE, TWO, VLLM_ARGS, running
from tests.real.fleet import REPLICAS, RESTART_SECONDS_MAX, SALT_SECRET, Fleet, until
from tests.real.prompts import Words
from tests.real.small_caches import BLOCK, LENGTH, SMALL, WHOLE, push_out, restoring, settle, stores
from transport.keys import KEY_BYTES, chain_keys, root_key
from transport.table.quality import mark_of, tenant_mark
from transport.table.tiers import host_memory_of

HOST_MEMORY = "128MiB"  # some 40 blocks for each replica
DISK_BYTES = 96 << 20
SEGMENT_BYTES = DISK_BYTES // 4
TURNS = 3
"""How many times over the disk is filled by others, and host memory with it, which holds less."""
SHARE = 0.5
PUSHES_MAX = 60
KEY = ONE.api_key.get_secret_value()
KEY_OF_TWO = TWO.api_key.get_secret_value()


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pins") / "disk"


@pytest.fixture(scope="module")
def tiered(disk) -> Iterator[Fleet]:
    """A fleet with small memories and a small disk, in which pins and a tenant may have half of each."""
    flags = ("--host-memory", HOST_MEMORY, "--disk", str(disk), "--disk-bytes", str(DISK_BYTES))
    flags += ("--pin-share-max", str(SHARE), "--tier-tenant-share-max", str(SHARE))
    flags += ("--tier-wait-seconds-max", "20")  # of a busy machine
    with running(Fleet(CONFIG, flags=flags, vllm_args=(*VLLM_ARGS, *SMALL), key=KEY)) as fleet:
        until(lambda: stores(fleet)["disk"]["state"] == "ok", 30, "the disk is in use")
        yield fleet


@pytest.fixture(scope="module")
def words(tiered) -> Words:
    return Words(tiered.model_dir)


@pytest.fixture(autouse=True)
def empty(tiered) -> None:
    """Each test begins with nothing kept or pinned anywhere."""
    tiered.wait_ready(RESTART_SECONDS_MAX)
    tiered.flush()


def churn(fleet: Fleet, words: Words, replica: str, turns: float, key: str = "") -> None:
    """Have a replica compute prompts until what came out of it has filled the disk so many times over."""
    before = stores(fleet)["disk"]["stored_bytes"]
    for _ in range(PUSHES_MAX):
        push_out(fleet, words, replica, key)
        if stores(fleet)["disk"]["stored_bytes"] - before >= turns * DISK_BYTES:
            break
    settle(fleet)
    assert stores(fleet)["disk"]["stored_bytes"] - before >= turns * DISK_BYTES


def keys_of(fleet: Fleet, replica: str, prompt: list[int]) -> set[bytes]:
    """The keys of a prompt's blocks, tenant one's."""
    with closing(fleet.table(replica)) as table:
        root = root_key(table.fingerprint, tenant_salt(SALT_SECRET.encode(), ONE.name))
        return set(map(bytes, chain_keys(root, prompt, table.block_size, table.hash_name)))


def in_host_memory(fleet: Fleet, replica: str, keys: set[bytes]) -> int:
    """How many of these blocks the replica's host memory offers."""
    with closing(fleet.table(host_memory_of(replica))) as table:
        return sum(bytes(table.key(slot)) in keys for slot, state in enumerate(table.states()) if not state & 1)


def on_the_disk(disk: Path, keys: set[bytes]) -> int:
    """How many of these blocks are on the disk."""
    return len({frame.id[-KEY_BYTES:] for frame in on_disk(disk)} & keys)


def test_a_pinned_prefix_is_restored_after_everything_else_gave_way(tiered, words, disk):
    control, pinned = words.ids(LENGTH), words.ids(LENGTH)
    wanted = {"ids": pinned[:WHOLE], "tenant": ONE.name}
    (place,) = tiered.client.post("/kv/prefixes", json=wanted).raise_for_status().json()["places"]
    assert place["state"] == "pinned"
    replica = place["replica"]
    (other,) = set(REPLICAS) - {replica}
    pinned_keys, control_keys = (keys_of(tiered, replica, prompt) for prompt in (pinned, control))
    local = tiered.answer(pinned, replica=replica)
    assert local.cached_tokens == WHOLE
    tiered.answer(control, replica=replica)
    push_out(tiered, words, replica)
    for keys in (pinned_keys, control_keys):
        until(lambda keys=keys: in_host_memory(tiered, replica, keys) == WHOLE // BLOCK, 30, "it is in host memory")
        until(lambda keys=keys: on_the_disk(disk, keys) == WHOLE // BLOCK, 30, "it is on the disk")

    churn(tiered, words, replica, TURNS)
    assert (in_host_memory(tiered, replica, pinned_keys), on_the_disk(disk, pinned_keys)) == (WHOLE // BLOCK, WHOLE // BLOCK)
    assert (in_host_memory(tiered, replica, control_keys), on_the_disk(disk, control_keys)) == (0, 0)
    assert stores(tiered)["disk"]["moved_frames"] >= WHOLE // BLOCK

    tiered.kill(replica)
    with restoring(tiered, other, "host_memory"):
        assert tiered.answer(pinned, replica=other).close_to(local, 1e-4)  # canaries may be in the same step
    tiered.wait_ready(RESTART_SECONDS_MAX)
    tiered.forget(*REPLICAS)
    with restoring(tiered, replica, "disk"):
        assert tiered.answer(pinned, replica=replica).close_to(local, 1e-4)
    with restoring(tiered, other, "disk", whole=0):
        tiered.answer(control, replica=other)


def test_a_flood_of_one_tenant_leaves_another_its_share_of_host_memory_and_of_the_disk(tiered, words, disk):
    replica, two = REPLICAS[0], tenant_mark(tenant_salt(SALT_SECRET.encode(), TWO.name))

    def blocks() -> tuple[int, int]:
        """How many blocks tenant two has in host memory, and how many there are room for."""
        with closing(tiered.table(host_memory_of(replica))) as table:
            states = [int(state) for state in table.states()]
        return sum(not state & 1 and mark_of(state) == two for state in states), len(states)

    def frames_bytes() -> int:
        """How much of the disk tenant two has."""
        return sum(len(frame) for frame in frames_on_disk(disk, lambda _: True) if frame_tenant(frame) == two)

    churn(tiered, words, replica, 1, KEY_OF_TWO)
    assert blocks()[0] > SHARE * blocks()[1]
    assert frames_bytes() > SHARE * DISK_BYTES
    last, control = words.ids(LENGTH), words.ids(LENGTH)
    tiered.answer(last, replica=replica, key=KEY_OF_TWO)
    local = tiered.answer(last, replica=replica, key=KEY_OF_TWO)
    tiered.answer(control, replica=replica)

    churn(tiered, words, replica, TURNS)
    own, slots = blocks()
    assert int(SHARE * slots) <= own <= int(SHARE * slots) + 1  # of an odd number one is left over
    assert SHARE * DISK_BYTES - SEGMENT_BYTES <= frames_bytes() <= SHARE * DISK_BYTES + HEAD.size  # they give way by segments
    with restoring(tiered, replica, "host_memory"):
        assert tiered.answer(last, replica=replica, key=KEY_OF_TWO).same_as(local)
    tiered.forget(*REPLICAS)
    with restoring(tiered, replica, "disk"):
        assert tiered.answer(last, replica=replica, key=KEY_OF_TWO).same_as(local)
    with restoring(tiered, replica, "host_memory", whole=0):
        tiered.answer(control, replica=replica)
