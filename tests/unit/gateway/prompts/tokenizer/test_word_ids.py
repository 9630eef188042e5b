"""Ids that are put together from those of words are those of the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.prompts.tokenizer.encoder import encode_all
from gateway.prompts.tokenizer.word_ids import ENTRY_BYTES, WordIds
from gateway.token_ids import TokenIds
from tests.unit.gateway.prompts.tokenizer.test_text_cuts import TEXTS, cuts_of, whole
from tests.unit.gateway.prompts.tokenizer.tokenizer_kinds import CUT, tokenizer_of

WORDS = st.sampled_from(("a", "The", "cat", "is", "2345", "don't", "mask", "of\nthe", "", "x1", ".", "é", "end.", "<|im_end|>"))
SENTENCES = st.lists(WORDS, max_size=30).map(" ".join)


class Words:
    """Word ids of one kind of tokenizer, and what had to be tokenised for them."""

    def __init__(self, kind: str, bytes_max: int = 1 << 20) -> None:
        self.tokenizer = tokenizer_of(kind)
        self.tokenised: list[str] = []
        self.ids = WordIds(self._tokenise, cuts_of(kind).places.words, bytes_max)

    def _tokenise(self, texts: list[str]) -> list[TokenIds]:
        self.tokenised += texts
        return encode_all(self.tokenizer, texts, False)

    def of(self, *texts: str) -> TokenIds:
        raw = self.ids.raw(texts)
        assert raw is not None
        return TokenIds(raw)


@pytest.mark.parametrize("kind", CUT)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.one_of(TEXTS, SENTENCES), min_size=1, max_size=6), bytes_max=st.sampled_from((0, 3000, 1 << 20)))
def test_a_text_gets_the_ids_of_the_whole_whatever_was_seen_before(kind: str, texts: list[str], bytes_max: int) -> None:
    words = Words(kind, bytes_max)
    for text in [*texts, *texts]:
        assert words.of(text) == whole(words.tokenizer, text)


def test_words_that_were_seen_are_not_tokenised_again() -> None:
    words = Words("Llama 3")
    words.of("one two three four")
    words.tokenised.clear()
    words.of("two four three one? four 5 two")
    assert words.tokenised == ["two", " one?", " four 5"]  # no space before the first, no letter behind that of the last


def test_a_word_that_was_seen_is_known_where_a_piece_begins_with_it() -> None:
    words = Words("GPT-2")
    first = words.of("x alpha beta gamma")
    words.tokenised.clear()
    assert words.of("x", " alpha beta", " gamma") == first
    assert words.tokenised == []


def test_pieces_of_a_text_are_put_one_behind_the_other() -> None:
    words = Words("Llama 3")
    assert words.of("one two", " three") == whole(words.tokenizer, "one two three")


def test_nothing_is_tokenised_when_more_is_new_than_may_be() -> None:
    words = Words("Llama 3")
    assert words.ids.raw(["one two"], new_chars_max=6) is None
    assert words.tokenised == []
    words.of("one two")
    assert words.ids.raw(["one two two"], new_chars_max=0) is not None


@pytest.mark.parametrize(("begin", "again"), [("a once", []), ("", ["a", " once"])], ids=["used", "not used"])
def test_the_memory_is_bounded_and_what_is_not_used_meanwhile_is_forgotten(begin: str, again: list[str]) -> None:
    words = Words("Llama 3", bytes_max=20 * ENTRY_BYTES)
    words.of("a once")
    for number in range(100):
        words.of(f"{begin} x{number}")
    words.tokenised.clear()
    words.of("a once")
    assert words.tokenised == again


def test_half_a_surrogate_pair_is_an_error() -> None:
    with pytest.raises(UnicodeEncodeError):
        Words("Llama 3").of("a \ud800 b")
