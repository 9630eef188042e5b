"""Keys out of the cache of chains are those of the chain."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.block_registry.chain_cache import ENTRY_BYTES, SECTION_BLOCKS, ChainCache
from gateway.token_ids import TokenIds
from transport.keys import HASH_NAMES, KEY_BYTES, chain_keys, root_key

ROOTS = [root_key(b"fingerprint", salt) for salt in ("", "another tenant")]
Prompt = tuple[bytes, int, str, int, int]
PROMPTS = st.tuples(
    st.sampled_from(ROOTS), st.integers(1, 3), st.sampled_from(HASH_NAMES), st.integers(0, 3), st.integers(0, 600)
)


@given(st.lists(PROMPTS, max_size=12), st.sampled_from([0, 5000, 1 << 20]))
def test_keys_are_the_chains_whatever_was_hashed_before(prompts: list[Prompt], bytes_max: int) -> None:
    cache = ChainCache(bytes_max)
    for root, block_size, hash_name, differs_at, length in prompts:
        ids = [token if token < differs_at * 200 else token + 1 for token in range(length)]
        blocks = length // block_size
        found = cache.chain(root, TokenIds.of(ids), blocks, block_size, hash_name)
        assert found.keys.tolist() == chain_keys(root, ids, block_size, hash_name).tolist()


def test_a_chain_goes_on_from_what_is_known_of_it_and_the_oldest_sections_go_first() -> None:
    section_bytes = (SECTION_BLOCKS + 1) * KEY_BYTES + ENTRY_BYTES
    cache, ids = ChainCache(3 * section_bytes), TokenIds.of(range(10 * SECTION_BLOCKS))
    cache.chain(ROOTS[0], ids, 2 * SECTION_BLOCKS + 5, 1, "sha256")
    assert len(cache) == 2
    cache.chain(ROOTS[0], ids, 3 * SECTION_BLOCKS, 1, "sha256")
    assert len(cache) == 3
    cache.chain(ROOTS[1], ids, 10 * SECTION_BLOCKS, 1, "sha256")
    assert len(cache) == 3


def test_sections_of_as_many_bytes_but_other_blocks_are_told_apart() -> None:
    cache, ids = ChainCache(1 << 20), TokenIds.of(range(512))
    for block_size, blocks in [(1, 64), (4, 16), (1, 64), (4, 128), (1, 512)]:
        found = cache.chain(ROOTS[0], ids, blocks, block_size, "xxh3_128")
        assert found.keys.tolist() == chain_keys(ROOTS[0], ids.tolist(), block_size)[:blocks].tolist()
