"""KnownPrefixes: taken only where they are exactly the text, and cut off as the text would be without them."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gateway.block_registry.chain_cache import ChainCache
from gateway.prompts.tokenizer.encoder import Encoder, EncoderMaker, encode_all
from gateway.prompts.tokenizer.known_prefixes import (
    ENCODED_CHARS_MAX,
    ENTRY_BYTES,
    KEY_CHARS,
    PREFIX_CHARS_MIN,
    RUN_MAX,
    TEXTS_MIN,
    KnownPrefixes,
)
from gateway.token_ids import TokenIds
from tests.unit.gateway.prompts.tokenizer.test_text_cuts import FRAGMENTS, cuts_of, whole
from tests.unit.gateway.prompts.tokenizer.tokenizer_kinds import CUT, tokenizer_of
from transport.keys import chain_keys

LONG_CHARS = 48 << 10
LONG_FRAGMENTS = ("a word", "The line\nNext", "<|im_start|>", "<|im_end|>\n", "don't 2345", "é\u0308", " ", "\n\n", "中文。")


def long_text(seed: int, chars: int) -> str:
    source = random.Random(seed)
    parts: list[str] = []
    while sum(map(len, parts)) < chars:
        parts.append(" ".join(source.choices(LONG_FRAGMENTS, k=20)))
    return " ".join(parts)


SYSTEM = "<|im_start|>system\nYou are an assistant that answers in as few words as it can.<|im_end|>\n<|im_start|>user\n"
DOCUMENTS = tuple(f"Of documents that begin alike, this is number {number}. {long_text(number, 300)}" for number in range(3))
ASKED = (" Question: what of it?", " Question: whatever else is there?")
ENDS = (*ASKED, "\nAnswer\n", "<|im_end|>\n<|im_start|>assistant\n", "\u0308", "")
PIECES = st.lists(st.sampled_from((*FRAGMENTS, *(" word",) * 20)), max_size=40).map("".join)


def prefixes_of(kind: str, bytes_max: int = 1 << 20) -> KnownPrefixes:
    tokenizer = tokenizer_of(kind)
    return KnownPrefixes(lambda text: whole(tokenizer, text).raw, cuts_of(kind), bytes_max)


def found(prefixes: KnownPrefixes, text: str) -> int:
    """Where the prefixes of a text end; what is left is taken notice of."""
    end, ids = prefixes.leading(text)
    if len(text) - end > KEY_CHARS:
        prefixes.note(text[end:])
    assert bool(end) == bool(ids)
    return end


@pytest.mark.parametrize("kind", CUT)
@settings(max_examples=40, deadline=None)
@given(
    begins=st.lists(PIECES, min_size=1, max_size=3),
    texts=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 200), PIECES), min_size=2, max_size=12),
    bytes_max=st.sampled_from((0, 40_000, 1 << 20)),
)
def test_texts_with_common_beginnings_get_the_ids_of_the_whole(
    kind: str, begins: list[str], texts: list[tuple[int, int, str]], bytes_max: int
) -> None:
    tokenizer = tokenizer_of(kind)
    encoder = EncoderMaker(tokenizer)(1 << 20, bytes_max)
    for number, chars, rest in [*texts, *texts]:
        begin = begins[number % len(begins)]
        text = (begin * 8)[: 2 * KEY_CHARS + chars] + rest
        assert encoder.encode(text, False) == whole(tokenizer, text)


@pytest.mark.parametrize("kind", CUT)
def test_a_text_gets_the_ids_of_the_whole_wherever_it_leaves_its_prefixes(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    encoder = EncoderMaker(tokenizer)(1 << 20)
    source = random.Random(kind)
    for _ in range(300):
        text = SYSTEM + source.choice(DOCUMENTS) + source.choice(ENDS)
        place = source.randrange(len(text))
        for known in (text, text[:place] + source.choice(FRAGMENTS) + source.choice(("", text[place:]))):
            assert encoder.encode(known, False) == whole(tokenizer, known)


def test_what_texts_begin_with_is_known_up_to_where_they_part() -> None:
    prefixes = prefixes_of("Llama 3")
    texts = [SYSTEM + document + question for document in DOCUMENTS for question in ASKED]
    for _ in range(4):
        for text in texts:
            found(prefixes, text)
    ends = [found(prefixes, text) for text in texts]
    assert [text[end:] for text, end in zip(texts, ends, strict=True)] == [" what of it?", " whatever else is there?"] * 3
    assert len({id(prefixes.leading(text)[1][0]) for text in texts}) == 1


def test_a_text_that_leaves_a_prefix_shortens_it() -> None:
    prefixes, text = prefixes_of("Llama 3"), SYSTEM + "Words that are the same in both, and then"
    for tail in (" one", " other"):
        found(prefixes, text + tail)
    assert found(prefixes, text + " of the two") == len(text)
    other = SYSTEM + "Words that agree no more"
    assert found(prefixes, other) == 0
    assert prefixes.leading(other)[0] == prefixes.leading(text)[0] == len(SYSTEM + "Words that")


def test_a_prefix_is_taken_where_the_text_may_be_cut_behind_it() -> None:
    prefixes, text = prefixes_of("Llama 3"), SYSTEM + "The end"
    for tail in (" one", " two"):
        found(prefixes, text + tail)
    assert prefixes.leading(text + " more")[0] == len(text)
    for tail in (" 2", "s", "", " ", "\u0308 a"):
        assert prefixes.leading(text + tail)[0] == 0


def test_texts_without_a_place_in_common_have_no_prefix() -> None:
    prefixes = prefixes_of("Llama 3")
    for number in range(4):
        assert found(prefixes, "x" * KEY_CHARS + f" {number}") == 0
    assert prefixes.leading("x" * KEY_CHARS + " 2") == (0, [])


def test_short_texts_are_not_kept() -> None:
    encoder, prefixes = encoder_of(tokenizer_of("Llama 3"), "Some words here "[: KEY_CHARS // 4] * 4)
    assert not prefixes._texts
    assert encoder.encode("Some words here " * 5, False) == whole(tokenizer_of("Llama 3"), "Some words here " * 5)
    assert len(prefixes._texts) == 1


@pytest.mark.parametrize("used", [True, False])
def test_the_memory_is_bounded_and_what_is_not_used_meanwhile_is_forgotten(used: bool) -> None:
    bytes_max = 40 * ENTRY_BYTES
    prefixes = prefixes_of("GPT-2", bytes_max)
    for tail in (" one", " two"):
        found(prefixes, SYSTEM + tail)
    for number in range(200):
        if used:
            assert found(prefixes, SYSTEM + " three") > PREFIX_CHARS_MIN
        found(prefixes, f"{number} " * KEY_CHARS)
        kept = [*prefixes._prefixes.values(), *prefixes._older[0].values()]
        texts = [*prefixes._texts.values(), *prefixes._older[1].values()]
        assert (
            sum(prefix.text.__sizeof__() + prefix.ids.held_bytes for prefix in kept) + sum(map(str.__sizeof__, texts))
            < bytes_max
        )
    assert bool(prefixes.leading(SYSTEM + " three")[0]) is used


def test_what_prefixes_hold_is_not_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("Llama 3")
    encoder = EncoderMaker(tokenizer)(1 << 20)
    known = f"{SYSTEM}The question"
    for tail in (" one", " other"):
        encoder.encode(known + tail, False)
    tokenised: list[str] = []

    def watched(tokenizer: object, texts: list[str], special: bool) -> list[TokenIds]:
        tokenised.extend(texts)
        return encode_all(tokenizer_of("Llama 3"), texts, special)

    monkeypatch.setattr("gateway.prompts.tokenizer.encoder.encode_all", watched)
    monkeypatch.setattr(encoder._words, "_words", {})
    monkeypatch.setattr(encoder._words, "_texts", {})
    assert encoder.encode(f"{known} of it", False) == whole(tokenizer, f"{known} of it")
    assert {*tokenised} == {" of", " it"}


def encoder_of(tokenizer: Tokenizer, *texts: str) -> tuple[Encoder, KnownPrefixes]:
    """An encoder to which each of these texts came twice, and its prefixes."""
    encoder = EncoderMaker(tokenizer)(64 << 20)
    for text in texts * 2:
        encoder.encode(text, False)
    assert encoder._prefixes is not None
    return encoder, encoder._prefixes


@pytest.mark.parametrize("kind", CUT)
def test_a_long_text_gets_the_ids_of_the_whole_however_it_goes_on(kind: str) -> None:
    tokenizer, text = tokenizer_of(kind), long_text(1, LONG_CHARS)
    encoder, prefixes = encoder_of(tokenizer, text)
    assert prefixes.leading(text)[0] > LONG_CHARS - 2 * ENCODED_CHARS_MAX
    source = random.Random(kind)
    for place in source.sample(range(1, len(text)), 8):
        for behind in ("", "Z", " z", "\nA", "<|im_start|>", "\u0308", "<|im_"):
            for known in (text[:place] + behind, text[:place] + behind + text[place:]):
                assert encoder.encode(known, False) == whole(tokenizer, known)


@pytest.mark.parametrize("behind", ["", " ", "b", " b", "\n", "\nb", "<|im_end|>", "<|im_en", "\u0308"])
def test_behind_a_long_prefix_everything_may_follow(behind: str) -> None:
    tokenizer, text = tokenizer_of("Llama 3"), long_text(2, LONG_CHARS)
    encoder, prefixes = encoder_of(tokenizer, text)
    chars, _ = prefixes.leading(text)
    for place in range(chars - 3, chars + 4):
        assert encoder.encode(text[:place] + behind, False) == whole(tokenizer, text[:place] + behind)


@pytest.mark.parametrize("place", [1000, 30_000])
def test_a_long_text_that_differs_in_one_character_shares_what_stands_before_it(place: int) -> None:
    tokenizer, text = tokenizer_of("Llama 3"), long_text(3, LONG_CHARS)
    encoder, prefixes = encoder_of(tokenizer, text)
    known, _ = prefixes.leading(text)
    other = text[:place] + "X" + text[place + 1 :]
    assert prefixes.leading(other) == (0, [])
    assert encoder.encode(other, False) == whole(tokenizer, other)
    assert 0 < prefixes.leading(other)[0] <= place
    assert prefixes.leading(text)[0] == known
    assert encoder.encode(text, False) == whole(tokenizer, text)


def test_long_texts_share_a_system_prompt_and_then_each_has_its_own() -> None:
    tokenizer = tokenizer_of("Llama 3")
    encoder, prefixes = encoder_of(tokenizer)
    texts = [SYSTEM + document + long_text(seed, LONG_CHARS) for seed, document in enumerate(DOCUMENTS)]
    for _ in range(4):
        for text in texts:
            assert encoder.encode(text + ASKED[0], False) == whole(tokenizer, text + ASKED[0])
    found = [prefixes.leading(text + ASKED[1]) for text in texts]
    assert all(end > len(text) - ENCODED_CHARS_MAX for text, (end, _) in zip(texts, found, strict=True))
    assert len({id(ids[0]) for _, ids in found}) == 1
    assert len({id(ids[1]) for _, ids in found}) == 3


def test_the_keys_of_long_prefixes_are_the_chains() -> None:
    text = long_text(4, LONG_CHARS)
    (encoder, _), cache = encoder_of(tokenizer_of("Llama 3"), text), ChainCache(1 << 20)
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


def test_a_conversation_that_grows_is_known_but_for_what_came_last() -> None:
    tokenizer, text = tokenizer_of("Llama 3"), long_text(10, LONG_CHARS)
    encoder, prefixes = encoder_of(tokenizer)
    for end in range(2000, len(text), 2000):
        assert encoder.encode(text[:end], False) == whole(tokenizer, text[:end])
    assert prefixes.leading(text)[0] > LONG_CHARS - 3 * 2000


def turns(seed: int, count: int) -> list[str]:
    return [f"<|im_start|>user\nTurn {number} {long_text(seed + number, 100)}<|im_end|>\n" for number in range(count)]


def test_the_turns_of_a_conversation_become_one_prefix_up_to_where_others_go_on_differently() -> None:
    tokenizer = tokenizer_of("Llama 3")
    encoder, prefixes = encoder_of(tokenizer)
    shared, one, other = turns(0, 3 * RUN_MAX), turns(100, 3 * RUN_MAX), turns(200, 3 * RUN_MAX)

    def grow(said: list[str], more: list[str]) -> str:
        for count in range(len(more) + 1):
            text = SYSTEM + "".join(said + more[:count])
            assert encoder.encode(text, False) == whole(tokenizer, text)
        return text

    both = grow([], shared)
    assert len(prefixes.leading(both)[1]) <= RUN_MAX
    texts = [grow(shared, one), grow(shared, other)]
    for _ in range(2):
        found = [prefixes.leading(text) for text in texts]
        assert all(end > len(text) - 500 for text, (end, _) in zip(texts, found, strict=True))
        assert all(len(ids) <= 2 * RUN_MAX for _, ids in found)
        for text in texts:
            assert encoder.encode(text + "And", False) == whole(tokenizer, text + "And")
    ends = [[len(each) for each in ids] for _, ids in found]
    assert ends[0] != ends[1]
    assert prefixes.leading(texts[0])[1][0] is prefixes.leading(texts[1])[1][0]


def test_what_is_not_made_of_known_chunks_is_short_enough_to_be_worked_out_at_once() -> None:
    tokenised: list[int] = []
    tokenizer = tokenizer_of("Llama 3")

    def ids_of(text: str) -> bytes:
        tokenised.append(len(text))
        return whole(tokenizer, text).raw

    prefixes, text = KnownPrefixes(ids_of, cuts_of("Llama 3"), 1 << 30), "Word " * 100_000
    for tail in ("one", "two"):
        prefixes.note(text + tail, [text + tail], [whole(tokenizer, "x")])
    assert tokenised == [ENCODED_CHARS_MAX - 2]
    assert prefixes.leading(text)[0] == ENCODED_CHARS_MAX - 2


def test_a_huge_text_does_not_push_out_all_others() -> None:
    bytes_max = 1 << 20
    prefixes = prefixes_of("Llama 3", bytes_max)
    for tail in (" one", " two"):
        found(prefixes, SYSTEM + tail)
    for number in range(TEXTS_MIN):
        found(prefixes, f"{number} {'word ' * bytes_max}")
    assert prefixes.leading(SYSTEM + " three")[0] > PREFIX_CHARS_MIN
