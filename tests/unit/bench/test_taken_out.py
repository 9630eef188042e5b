"""What `bench.beside` takes out is there, under the names by which it is taken out."""

import subprocess
import sys
from pathlib import Path

import pytest

import bench.taken_out
from bench.arms import WITHOUT, Arm

FILES = sorted(path for path in Path(bench.taken_out.__file__).parent.glob("*.py") if not path.name.startswith("__"))

CHECK = """
import sys
from gateway.block_registry.chain_cache import ChainCache
from gateway.prompts.tokenizer.id_cache import IdCache
from gateway.prompts.tokenizer.known_prefixes import KnownPrefixes
from gateway.prompts.tokenizer.word_ids import WordIds
from bench import planning

places = [(ChainCache, "chain"), (IdCache, "get"), (KnownPrefixes, "leading"), (WordIds, "raw"), (planning, "HOLD_SECONDS")]
before = [getattr(*place) for place in places]
exec(open(sys.argv[1]).read())
changed = [place[1] for place, was in zip(places, before) if getattr(*place) != was]
print(*changed)
"""
GATEWAY_CHECK = """
import importlib, sys
from gateway.http_server.known_head import KnownHead
from gateway.relay import batching
from gateway.relay.going_on import GoingOn
from gateway.serve import memory
from gateway.steering.costs.sampling import Sampling
from gateway.upstream import answer_head

places = [(KnownHead, "of"), (answer_head, "cut_head"), (batching, "WAITING_MAX"), (memory, "_spare_the_collector")]
places += [(Sampling, "takes"), (GoingOn, "tape")]
before = [getattr(*place) for place in places]
importlib.import_module("bench.taken_out.gateway." + sys.argv[1])
print(*(place[1] for place, was in zip(places, before) if getattr(*place) != was))
"""
TAKEN_FROM_GATEWAY = {
    "heads": ["of", "cut_head"],
    "batching": ["WAITING_MAX"],
    "collector": ["_spare_the_collector"],
    "sampling": ["takes"],
    "continuity": ["tape"],
}
TAKEN = {"chains": "chain", "digests": "get", "hold": "HOLD_SECONDS", "prefixes": "leading", "words": "raw"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_takes_one_mechanism_out(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CHECK, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [TAKEN[path.stem]]


@pytest.mark.parametrize("arm", WITHOUT, ids=lambda arm: arm.name)
def test_each_arm_without_a_mechanism_takes_it_out(arm: Arm) -> None:
    name = arm.name.removeprefix("peerkv -")
    done = subprocess.run([sys.executable, "-c", GATEWAY_CHECK, name], capture_output=True, text=True, check=True)
    assert done.stdout.split() == TAKEN_FROM_GATEWAY[name]


REACHED = """
import importlib, sys
from types import SimpleNamespace
from gateway.block_registry import fleet_state

table = SimpleNamespace(
    status="ok", block_size=16, hash_name="xxh3_128", transport="t", fingerprint=b"f", fingerprint_fields={}, groups=(), epoch=1
)
if sys.argv[1:]:
    importlib.import_module("bench.taken_out.gateway." + sys.argv[1])
tables = dict.fromkeys(("a", "b"), table)
tiers = dict.fromkeys(("a.host-memory", "b.host-memory"), table)
caches = fleet_state._exchanging(tables, set())
kinds = fleet_state._kinds(tables, tiers, set())
print(*sorted(caches["a"]), *sorted(kinds[0].tiers["a"]))
"""


@pytest.mark.parametrize(
    ("names", "reached"),
    [
        ([], ["b", "a.host-memory", "b.host-memory"]),
        (["pool"], ["b", "a.host-memory"]),
        (["exchange"], ["a.host-memory"]),
    ],
)
def test_without_the_pool_or_all_exchange_a_replica_keeps_its_own_host_memory(names: list[str], reached: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", REACHED, *names], capture_output=True, text=True, check=True)
    assert done.stdout.split() == reached
