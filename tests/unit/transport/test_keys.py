"""Block keys: equal exactly when everything that KV depends on is equal."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.keys import HASH_NAMES, HASHES, KeyChain, chain_keys, hash_blocks, root_key

ROOT = root_key(b"f" * 16)
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=200)


@given(TOKENS, st.lists(st.integers(0, 200), max_size=6), st.sampled_from(HASH_NAMES))
def test_a_chain_grown_in_pieces_equals_one_made_at_once(tokens, cuts, hash_name):
    chain = KeyChain(ROOT, 8, hash_name)
    at = 0
    for cut in [*sorted(cuts), len(tokens)]:
        chain.extend(tokens[at:cut])
        at = max(at, min(cut, len(tokens)))
    assert np.array_equal(chain.keys, chain_keys(ROOT, tokens, 8, hash_name))
    assert chain.tokens == len(tokens)
    assert chain.keys.shape == (len(tokens) // 8, 2)


@given(st.lists(st.integers(0, 99), min_size=32, max_size=64), st.integers(0, 31))
def test_a_changed_token_changes_every_key_from_its_block_on(tokens, place):
    changed = list(tokens)
    changed[place] += 1
    ours, theirs = chain_keys(ROOT, tokens, 8), chain_keys(ROOT, changed, 8)
    same = (ours == theirs).all(axis=1)
    assert same.tolist() == [block < place // 8 for block in range(len(ours))]


@pytest.mark.parametrize(
    "other",
    [root_key(b"g" * 16), root_key(b"f" * 16, "salt"), root_key(b"f" * 16, "", "lora"), root_key(b"f" * 16, "", "", "sha256")],
)
def test_fingerprint_salt_adapter_and_hash_each_give_other_keys(other):
    assert other != ROOT
    assert not (chain_keys(other, range(64), 8) == chain_keys(ROOT, range(64), 8)).any()


def test_salt_and_adapter_can_not_be_shifted_into_each_other():
    assert root_key(b"f" * 16, "ab", "c") != root_key(b"f" * 16, "a", "bc")


def test_extra_content_changes_its_block_and_all_after_it():
    plain = KeyChain(ROOT, 4)
    plain.extend(range(16))
    imaged = KeyChain(ROOT, 4)
    imaged.extend(range(6), {2: b"image"})
    imaged.extend(range(6, 16), {2: b"image"})
    assert (plain.keys == imaged.keys).all(axis=1).tolist() == [True, True, False, False]


@pytest.mark.parametrize("bad", [2**31, -(2**31) - 1])
def test_an_id_outside_int32_is_refused(bad):
    with pytest.raises(OverflowError):
        chain_keys(ROOT, [bad] * 8, 8)


@given(st.binary(max_size=300), st.integers(1, 9), st.sampled_from(HASH_NAMES))
def test_each_full_block_is_hashed_behind_the_key_before_it(raw, block_size, hash_name):
    last, keys = b"k" * 16, b""
    for place in range(0, len(raw) // (4 * block_size) * 4 * block_size, 4 * block_size):
        last = HASHES[hash_name](last + raw[place : place + 4 * block_size])
        keys += last
    assert hash_blocks(b"k" * 16, raw, block_size, hash_name) == keys
