"""The GPU's copy, run by Triton's interpreter on CPU memory, raw addresses included."""

import os
import subprocess
import sys

PROGRAM = """
import torch
from transport.backends.gather import CHUNK_WORDS_MAX, gather

def table(tensors):
    rows = [[t.data_ptr(), t.stride(0) * 8, t[0].numel()] for t in tensors]
    return torch.tensor(rows, dtype=torch.int64).t().contiguous()

for words, programs in ((6, 1), (48, 3), (CHUNK_WORDS_MAX + 40, 5)):
    whole = torch.randint(-(2**62), 2**62, (10, 3, words))
    source = [whole[:, layer] for layer in range(3)]
    target = [torch.full((7, words + 2), -1)[:, :words] for layer in range(3)]
    blocks = torch.tensor([[9, 0, 4], [1, 6, 2]], dtype=torch.int32)
    gather(table(source), table(target), blocks, words, programs)
    for s, t in zip(source, target):
        for block in range(7):
            wanted = {1: s[9], 6: s[0], 2: s[4]}.get(block, torch.full((words,), -1))
            assert torch.equal(t[block], wanted), (words, programs, block)
    assert all((t.as_strided((7, 2), (words + 2, 1), words) == -1).all() for t in target)
print("copied")
"""


def test_the_gather_copies_the_blocks_it_is_given_and_nothing_beside_them():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "copied", done.stderr
