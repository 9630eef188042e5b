"""LongPrefixes of text: taken only where they are exactly the text, and cut off as the text would be without them."""

import random

import pytest
from tokenizers import Tokenizer

from gateway.block_registry.chain_cache import ChainCache
from gateway.prompts.tokenizer.encoder import Encoder, EncoderMaker
from gateway.prompts.tokenizer.long_prefixes import LONG_PREFIX_CHARS_MIN, MEDIUM_PREFIX_CHARS_MIN, REPLACED_EVERY, LongPrefixes
from gateway.token_ids import TokenIds
from tests.unit.gateway.prompts.tokenizer.test_text_cuts import whole
from tests.unit.gateway.prompts.tokenizer.tokenizer_kinds import CUT, tokenizer_of
from transport.keys import chain_keys

FRAGMENTS = ("a word", "The line\nNext", "<|im_start|>", "<|im_end|>\n", "don't 2345", "é\u0308", " ", "\n\n", "中文。")


def long_text(seed: int, chars: int) -> str:
    source = random.Random(seed)
    parts: list[str] = []
    while sum(map(len, parts)) < chars:
        parts.append(" ".join(source.choices(FRAGMENTS, k=20)))
    return " ".join(parts)


def leading(prefixes: LongPrefixes, text: str) -> tuple[int, list[TokenIds]]:
    end, found = prefixes.leading(text)
    return end, [prefix.ids for prefix in found]


def seen(tokenizer: Tokenizer, *texts: str) -> Encoder:
    """An encoder that made prefixes of these texts: each came twice."""
    encoder = EncoderMaker(tokenizer)(64 << 20)
    for text in texts * 2:
        encoder.encode(text, False)
    assert len(encoder._long_prefixes)
    return encoder


@pytest.mark.parametrize("kind", CUT)
def test_a_text_of_pages_gets_the_ids_of_the_whole_however_it_goes_on(kind: str) -> None:
    tokenizer, text = tokenizer_of(kind), long_text(1, 3 * LONG_PREFIX_CHARS_MIN)
    encoder = seen(tokenizer, text)
    source = random.Random(kind)
    for place in source.sample(range(1, len(text)), 8):
        for behind in ("", "Z", " z", "\nA", "<|im_start|>", "\u0308", "<|im_"):
            for known in (text[:place] + behind, text[:place] + behind + text[place:]):
                assert encoder.encode(known, False) == whole(tokenizer, known)


@pytest.mark.parametrize("behind", ["", " ", "b", " b", "\n", "\nb", "<|im_end|>", "<|im_en", "\u0308"])
def test_behind_a_page_everything_may_follow(behind: str) -> None:
    tokenizer, text = tokenizer_of("Llama 3"), long_text(2, 3 * LONG_PREFIX_CHARS_MIN)
    encoder = seen(tokenizer, text)
    chars, _ = encoder._long_prefixes.leading(text)
    assert chars > 2 * LONG_PREFIX_CHARS_MIN
    for place in range(chars - 3, chars + 4):
        assert encoder.encode(text[:place] + behind, False) == whole(tokenizer, text[:place] + behind)


def test_a_page_of_another_text_with_the_same_samples_is_not_taken() -> None:
    tokenizer, text = tokenizer_of("Llama 3"), long_text(3, 3 * LONG_PREFIX_CHARS_MIN)
    encoder = seen(tokenizer, text)
    other = text[:1000] + "X" + text[1001:]
    assert encoder._long_prefixes.leading(other) == (0, [])
    assert encoder.encode(other, False) == whole(tokenizer, other)


def test_a_page_is_taken_whatever_word_follows() -> None:
    tokenizer, text = tokenizer_of("Llama 3"), "word " * (LONG_PREFIX_CHARS_MIN // 5 + 10) + "Question:"
    encoder = seen(tokenizer, text + " a b" * 1000)
    chars, _ = encoder._long_prefixes.leading(text + " a b" * 1000)
    for behind, taken in ((" z", True), (" 2", False), ("z", False), ("", False)):
        known = text[:chars] + behind
        assert encoder._long_prefixes.leading(known)[0] == (chars if taken else 0)
        assert encoder.encode(known, False) == whole(tokenizer, known)


def test_pages_are_bounded_in_bytes_and_the_least_recently_used_go_first() -> None:
    texts = [chr(ord("a") + number) * (LONG_PREFIX_CHARS_MIN + 10) for number in range(4)]
    prefixes, ids = LongPrefixes(3 * (LONG_PREFIX_CHARS_MIN + 2000)), TokenIds.of(range(10))
    for text in texts[:3]:
        prefixes.keep([text[:-5]], [ids], text[-5:])
    assert leading(prefixes, texts[0]) == (LONG_PREFIX_CHARS_MIN + 5, [ids])
    prefixes.keep([texts[3][:-5]], [ids], texts[3][-5:])
    assert [len(prefixes.leading(text)[1]) for text in texts] == [1, 0, 1, 1]


def test_of_pages_that_look_the_same_one_is_kept_and_replaced_after_a_while() -> None:
    text, ids = "x" * LONG_PREFIX_CHARS_MIN, TokenIds.of([1])
    prefixes = LongPrefixes(1 << 20)
    prefixes.keep([text + "old"], [ids], " y")
    for _ in range(REPLACED_EVERY):
        assert leading(prefixes, text + "new y") == (0, [])
        prefixes.keep([text + "new"], [ids], " y")
    assert leading(prefixes, text + "new y") == (LONG_PREFIX_CHARS_MIN + 3, [ids])
    assert (len(prefixes), leading(prefixes, text + "old y")) == (1, (0, []))


def test_the_keys_of_pages_are_the_chains() -> None:
    text = long_text(4, 4 * LONG_PREFIX_CHARS_MIN)
    encoder, cache = seen(tokenizer_of("Llama 3"), text), ChainCache(1 << 20)
    bos = TokenIds.of([1])
    for tail in ("", " More words"):
        ids = encoder.encode(text + tail, False)
        assert ids is not None
        assert any(part.serial for part in ids.parts)
        for whole_ids in (ids, TokenIds.joined([bos, ids])):
            for root in (b"r" * 16, b"s" * 16):
                for block_size in (3, 16):
                    for blocks in (len(whole_ids) // block_size, len(whole_ids) // block_size // 2, 1, 0):
                        found = cache.chain(root, whole_ids, blocks, block_size, "xxh3_128")
                        expected = chain_keys(root, whole_ids[: blocks * block_size], block_size)
                        assert found.keys.tolist() == expected.tolist()


def test_what_is_no_page_is_a_leaf_and_gets_the_ids_of_the_whole_however_it_goes_on() -> None:
    tokenizer, text = tokenizer_of("Llama 3"), long_text(5, 3 * MEDIUM_PREFIX_CHARS_MIN)
    encoder = EncoderMaker(tokenizer)(64 << 20)
    for tail in (" one", " two"):
        encoder.encode(text + tail, False)
    chars, found = encoder._medium_prefixes.leading(text + " three")
    assert (len(encoder._long_prefixes), len(found)) == (0, 1)
    assert chars >= 2 * MEDIUM_PREFIX_CHARS_MIN
    for place in (*range(chars - 3, chars + 4), 1, MEDIUM_PREFIX_CHARS_MIN + 1, len(text)):
        for behind in ("", "Z", " z", "\nA", "<|im_start|>", "\u0308", "<|im_"):
            for known in (text[:place] + behind, text[:place] + behind + text[place:]):
                assert encoder.encode(known, False) == whole(tokenizer, known)


def test_texts_with_a_beginning_in_common_share_its_leaf() -> None:
    tokenizer, common = tokenizer_of("Llama 3"), long_text(6, 2 * MEDIUM_PREFIX_CHARS_MIN)
    encoder = EncoderMaker(tokenizer)(64 << 20)
    texts = [f"{common} {long_text(seed, 3 * MEDIUM_PREFIX_CHARS_MIN)}" for seed in (7, 8, 9)]
    for text in texts * 3:
        assert encoder.encode(text, False) == whole(tokenizer, text)
    found = [encoder._medium_prefixes.leading(text)[1] for text in texts]
    assert [len(medium) for medium in found] == [2, 2, 2]
    assert found[0][0] is found[1][0] is found[2][0]


def test_a_conversation_that_grows_leaf_by_leaf_becomes_pages() -> None:
    tokenizer, text = tokenizer_of("Llama 3"), long_text(10, 3 * LONG_PREFIX_CHARS_MIN)
    encoder = EncoderMaker(tokenizer)(64 << 20)
    for end in range(2 * MEDIUM_PREFIX_CHARS_MIN, len(text), 2 * MEDIUM_PREFIX_CHARS_MIN):
        for _ in range(2):
            assert encoder.encode(text[:end], False) == whole(tokenizer, text[:end])
    assert encoder._long_prefixes.leading(text)[0] > LONG_PREFIX_CHARS_MIN
