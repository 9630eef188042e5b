"""ShortPrefixes: taken only where they are exactly the text, and cut off as the text would be without them."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.prompts.tokenizer.encoder import EncoderMaker, encode_all
from gateway.prompts.tokenizer.short_prefixes import ENTRY_BYTES, KEY_CHARS, SHORT_PREFIX_CHARS_MIN, ShortPrefixes
from gateway.token_ids import TokenIds
from tests.unit.gateway.prompts.tokenizer.test_long_prefixes import long_text
from tests.unit.gateway.prompts.tokenizer.test_text_cuts import FRAGMENTS, cuts_of, whole
from tests.unit.gateway.prompts.tokenizer.tokenizer_kinds import CUT, tokenizer_of

SYSTEM = "<|im_start|>system\nYou are an assistant that answers in as few words as it can.<|im_end|>\n<|im_start|>user\n"
DOCUMENTS = tuple(f"Of documents that begin alike, this is number {number}. {long_text(number, 300)}" for number in range(3))
ASKED = (" Question: what of it?", " Question: whatever else is there?")
ENDS = (*ASKED, "\nAnswer\n", "<|im_end|>\n<|im_start|>assistant\n", "\u0308", "")
PIECES = st.lists(st.sampled_from((*FRAGMENTS, *(" word",) * 20)), max_size=40).map("".join)


def prefixes_of(kind: str, bytes_max: int = 1 << 20) -> ShortPrefixes:
    tokenizer = tokenizer_of(kind)
    return ShortPrefixes(lambda text: whole(tokenizer, text).raw, cuts_of(kind), bytes_max)


def found(prefixes: ShortPrefixes, text: str) -> int:
    """Where the prefixes of a text end; what is left is taken notice of."""
    end, ids = prefixes.leading(text)
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
def test_a_text_gets_the_ids_of_the_whole_wherever_it_leaves_its_heads(kind: str) -> None:
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


def test_a_text_that_leaves_a_head_shortens_it() -> None:
    prefixes, text = prefixes_of("Llama 3"), SYSTEM + "Words that are the same in both, and then"
    for tail in (" one", " other"):
        found(prefixes, text + tail)
    assert found(prefixes, text + " of the two") == len(text)
    other = SYSTEM + "Words that agree no more"
    assert found(prefixes, other) == 0
    assert prefixes.leading(other)[0] == prefixes.leading(text)[0] == len(SYSTEM + "Words that")


def test_a_head_is_taken_where_the_text_may_be_cut_behind_it() -> None:
    prefixes, text = prefixes_of("Llama 3"), SYSTEM + "The end"
    for tail in (" one", " two"):
        found(prefixes, text + tail)
    assert prefixes.leading(text + " more")[0] == len(text)
    for tail in (" 2", "s", "", " ", "\u0308 a"):
        assert prefixes.leading(text + tail)[0] == 0


def test_texts_without_a_place_in_common_have_no_head() -> None:
    prefixes = prefixes_of("Llama 3")
    for number in range(4):
        assert found(prefixes, "x" * KEY_CHARS + f" {number}") == 0
    assert prefixes.leading("x" * KEY_CHARS + " 2") == (0, [])


def test_short_texts_are_not_kept() -> None:
    prefixes = prefixes_of("Llama 3")
    for _ in range(3):
        assert found(prefixes, "Some words here "[: KEY_CHARS // 4] * 4) == 0
    assert prefixes.leading("Some words here " * 5) == (0, [])


@pytest.mark.parametrize("used", [True, False])
def test_the_memory_is_bounded_and_what_is_not_used_meanwhile_is_forgotten(used: bool) -> None:
    bytes_max = 40 * ENTRY_BYTES
    prefixes = prefixes_of("GPT-2", bytes_max)
    for tail in (" one", " two"):
        found(prefixes, SYSTEM + tail)
    for number in range(200):
        if used:
            assert found(prefixes, SYSTEM + " three") > SHORT_PREFIX_CHARS_MIN
        found(prefixes, f"{number} " * KEY_CHARS)
        kept = [*prefixes._short_prefixes.values(), *prefixes._older[0].values()]
        texts = [*prefixes._texts.values(), *prefixes._older[1].values()]
        assert (
            sum(prefix.text.__sizeof__() + prefix.ids.held_bytes for prefix in kept) + sum(map(str.__sizeof__, texts))
            < bytes_max
        )
    assert bool(prefixes.leading(SYSTEM + " three")[0]) is used


def test_what_heads_hold_is_not_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
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
