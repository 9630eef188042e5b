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
