"""Blocks as other bytes, for a wire, a disk or another host: a frame is one KV block of one tensor-parallel rank.

`frame` writes and reads frames, `shape` says what lies in a block, `codecs` names the codecs. Whoever reads a frame believes
nothing it says: any doubt is an error of `errors`, and a miss. A new codec is one module and one line in `codecs`; the contract
tests of `tests/unit/transport/frames/test_codecs.py` then run on it. Lossy codecs need numba, which comes with vLLM.
"""
