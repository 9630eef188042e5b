"""The GPU's copy, run by Triton's interpreter on CPU memory, raw addresses included."""

import os
import subprocess
import sys

HEAD = """
import torch
from transport.backends.gather import CHUNK_WORDS_MAX, gather, plan, segments_of

def table(tensors):
    rows = [[t.data_ptr(), t.stride(0) * 8, t[0].numel()] for t in tensors]
    return torch.tensor(rows, dtype=torch.int64).t().contiguous()

def copy(source, target, groups, counts, blocks, programs):
    segments = segments_of([(group, t[0].numel() * 8) for group, t in zip(groups, target)])
    ends = [sum(counts[: n + 1]) for n in range(len(counts))]
    rows, pieces = plan(segments, [slice(e - c, e) for e, c in zip(ends, counts)])
    gather(table(source), table(target), segments, torch.from_numpy(rows.ravel()), pieces, blocks, programs)
"""
ONE_GROUP = """
for words, programs in ((6, 1), (48, 3), (CHUNK_WORDS_MAX + 40, 5)):
    whole = torch.randint(-(2**62), 2**62, (10, 3, words))
    source = [whole[:, layer] for layer in range(3)]
    target = [torch.full((7, words + 2), -1)[:, :words] for layer in range(3)]
    blocks = torch.tensor([[9, 0, 4], [1, 6, 2]], dtype=torch.int32)
    copy(source, target, [0, 0, 0], [3], blocks, programs)
    for s, t in zip(source, target):
        for block in range(7):
            wanted = {1: s[9], 6: s[0], 2: s[4]}.get(block, torch.full((words,), -1))
            assert torch.equal(t[block], wanted), (words, programs, block)
    assert all((t.as_strided((7, 2), (words + 2, 1), words) == -1).all() for t in target)
print("copied")
"""
SEVERAL = """
import itertools
WORDS = [5, 5, 9, 3, CHUNK_WORDS_MAX + 7]  # of the layers' blocks; the last two groups lie over the same memory as others may
GROUPS = [0, 0, 1, 2, 2]
for counts, programs in itertools.product([(3, 2, 1), (0, 2, 0), (2, 0, 1), (0, 0, 0), (3, 0, 0)], (1, 4)):
    source = [torch.randint(-(2**62), 2**62, (12, words)) for words in WORDS]
    target = [torch.full((12, words), -1) for words in WORDS]
    total = sum(counts)
    blocks = torch.stack((torch.randperm(12)[:total], torch.randperm(12)[:total])).to(torch.int32)
    copy(source, target, GROUPS, counts, blocks, programs)
    first = 0
    for group, count in enumerate(counts):
        moved = dict(zip(blocks[1, first : first + count].tolist(), blocks[0, first : first + count].tolist()))
        first += count
        for s, t in ((s, t) for s, t, g in zip(source, target, GROUPS) if g == group):
            for block in range(12):
                wanted = s[moved[block]] if block in moved else torch.full_like(t[block], -1)
                assert torch.equal(t[block], wanted), (counts, programs, group, block)
print("copied")
"""


def interpreted(program: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", HEAD + program], env=environment, capture_output=True, text=True, timeout=120)
    return done.stdout.strip() or done.stderr


def test_the_gather_copies_the_blocks_it_is_given_and_nothing_beside_them():
    assert interpreted(ONE_GROUP) == "copied"


def test_one_launch_copies_each_groups_blocks_of_that_groups_layers_alone():
    assert interpreted(SEVERAL) == "copied"
