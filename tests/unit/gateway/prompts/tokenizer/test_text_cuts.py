"""Token ids of texts that were cut up are those of the whole, for the tokenizers that are said to be of such a kind."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from gateway.prompts.tokenizer.encoder import EncoderMaker, cuts_are_exact, encode_all, find_affixes
from gateway.prompts.tokenizer.id_cache import ENTRY_BYTES, IdCache
from gateway.prompts.tokenizer.text_cuts import WORD_ENDS, Places, TextCuts, find_cuts
from gateway.token_ids import TokenIds
from tests.unit.gateway.prompts.tokenizer.tokenizer_kinds import CUT, SPECIALS, WHOLE, tokenizer_of

FRAGMENTS = (
    *("a", "The", "of", "don't", "HE'LL", "'s", "'", "re", "x1", "mask", "end of line", ".\nThe"),
    *(" ", "  ", "\n", "\n\n", "\r\n", "\r", "\t", " \n", "\n ", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c", "\x00"),
    *("1", "2345", "½", "٣", ".", "...", "!", "/", "{", "}\n", "_", "-", '"', "<", "|", "▁", "▁the"),
    *("é", "e\u0301", "\u0308", "ß", "İ", "ﬁ", "Å", "Ω", "Я", "中", "第二", "。", "か\u3099", "が", "한", "\u1112\u1161", "م"),
    *("😀", "👨\u200d👩", "\ufeff", "\u200b", "\U000e0041", *SPECIALS, "<|im_", "<mask>", "<unk>"),
)
TEXTS = (
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=40)
    .map("".join)
    .filter(lambda text: text.isprintable() or text.encode("utf-8", "ignore").decode() == text)
)


def whole(tokenizer: Tokenizer, text: str, special: bool = False) -> TokenIds:
    return encode_all(tokenizer, [text], special)[0]


def cuts_of(kind: str) -> TextCuts:
    cuts = find_cuts(tokenizer_of(kind))
    assert cuts is not None
    return cuts


@pytest.mark.parametrize("kind", CUT)
@settings(max_examples=300, deadline=None)
@given(text=TEXTS, size=st.integers(1, 12))
def test_chunks_get_the_ids_of_the_whole(kind: str, text: str, size: int) -> None:
    tokenizer = tokenizer_of(kind)
    chunks = cuts_of(kind).sized(size).chunks(text)
    assert "".join(chunks) == text
    assert TokenIds.joined(encode_all(tokenizer, chunks, False)) == whole(tokenizer, text)


@pytest.mark.parametrize("kind", CUT)
@given(text=TEXTS)
def test_a_place_that_is_seen_at_a_glance_is_one_by_the_expression(kind: str, text: str) -> None:
    cuts = cuts_of(kind)
    there = re.compile(cuts.places.pattern_there()).match
    places = range(1, len(text) + 1)
    assert [cuts.at(text, place) for place in places] == [there(text, place) is not None for place in places]


@pytest.mark.parametrize("kind", ["Qwen 2", "Gemma", "RoBERTa's mask"])
@settings(max_examples=200, deadline=None)
@given(first=TEXTS, rest=TEXTS, size=st.integers(1, 12))
def test_a_text_that_goes_on_begins_with_the_same_chunks(kind: str, first: str, rest: str, size: int) -> None:
    cuts = cuts_of(kind).sized(size, 20)
    short, long = cuts.chunks(first), cuts.chunks(first + rest)
    assert long[: len(short) - 1] == short[:-1]


@pytest.mark.parametrize("kind", [*CUT, *WHOLE])
def test_an_encoder_gives_the_ids_of_the_whole_however_much_of_it_was_seen(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    encoder = EncoderMaker(tokenizer)(1 << 20)
    lines = "word Line\n" * 300
    turns = [f"<|im_start|>user\nQuestion {turn}: what's new?\n\n{lines}<|im_end|>\n" for turn in range(6)]
    for special in (False, True):
        for end in (1, 2, 6, 3, 6):
            text = "".join(turns[:end])
            assert encoder.encode(text, special) == whole(tokenizer, text, special)


@pytest.mark.parametrize("kind", CUT)
def test_kinds_that_can_be_cut_are_cut_at_places_that_texts_have(kind: str) -> None:
    assert EncoderMaker(tokenizer_of(kind))(0)._cuts is not None
    assert len(cuts_of(kind).sized(100).chunks("A line of words\nAnother <|im_start|>" * 100)) > 20


@pytest.mark.parametrize("kind", WHOLE)
def test_other_kinds_are_not_cut(kind: str) -> None:
    assert find_cuts(tokenizer_of(kind)) is None


def test_tokens_that_merges_do_not_lead_to_rule_cuts_of_one_piece_out() -> None:
    tokenizer = Tokenizer.from_str(tokenizer_of("Gemma").to_str())  # others use that one
    assert find_cuts(tokenizer) is not None
    tokenizer.model.ignore_merges = True
    assert find_cuts(tokenizer) is None


def test_tokens_across_places_rule_these_places_out() -> None:
    places = cuts_of("added across places").places
    assert (places.lines, places.words, set(places.specials)) == (False, "", {*SPECIALS, "<unk>"})
    assert cuts_of("Llama 3").places.words == WORD_ENDS[0]


def test_behind_a_token_that_takes_the_space_behind_it_no_text_is_cut() -> None:
    assert cuts_of("RoBERTa's mask").places.words == WORD_ENDS[1]
    assert cuts_of("RoBERTa's mask").sized(1).chunks("x. y <mask> z a b") == ["x. y <mask> z", " a", " b"]
    assert cuts_of("GPT-2").sized(1).chunks("x. y <mask> z a b") == ["x.", " y <mask>", " z", " a", " b"]


def test_a_token_that_looks_around_and_is_a_letter_once_it_is_normalised_rules_cuts_out() -> None:
    tokenizer = Tokenizer.from_str(tokenizer_of("NFKD").to_str())
    assert find_cuts(tokenizer) is not None
    tokenizer.add_tokens([AddedToken("\N{TRADE MARK SIGN}", normalized=True, rstrip=True)])
    assert find_cuts(tokenizer) is None


def test_special_tokens_that_are_taken_as_text_are_no_places() -> None:
    tokenizer = Tokenizer.from_str(tokenizer_of("Llama 3").to_str())
    tokenizer.encode_special_tokens = True
    cuts = find_cuts(tokenizer)
    assert cuts is not None
    assert cuts.places.specials == ()
    assert cuts_are_exact(tokenizer, cuts)


@pytest.mark.parametrize("kind", ["Metaspace", "Llama 2", "prefix space", "another regular expression"])
def test_the_trial_at_load_finds_cuts_that_are_not_exact(kind: str) -> None:
    assert not cuts_are_exact(tokenizer_of(kind), TextCuts(Places(lines=True, words=WORD_ENDS[-1], specials=SPECIALS)))


def test_where_the_trial_fails_texts_are_taken_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    inexact = TextCuts(Places(lines=True, words=WORD_ENDS[-1], specials=()))
    monkeypatch.setattr("gateway.prompts.tokenizer.encoder.find_cuts", lambda tokenizer: inexact)
    assert EncoderMaker(tokenizer_of("Metaspace"))(0)._cuts is None


def test_a_text_without_places_is_one_chunk_behind_the_bound() -> None:
    cuts = cuts_of("GPT-2").sized(10, 50)
    assert cuts.chunks("word " * 4 + "x" * 100 + " word" * 4) == ["word word word", " word " + "x" * 100 + " word" * 4]
    assert cuts.chunks("") == [""]


def test_nothing_is_tokenised_when_more_is_new_than_may_be() -> None:
    encoder = EncoderMaker(tokenizer_of("Llama 3"))(1 << 20)
    text = "Some words in a line.\n" * 1000
    assert encoder.encode(text, False, new_chars_max=10_000) is None
    ids = encoder.encode(text, False)
    assert encoder.encode(text, False, new_chars_max=0) == ids
    assert encoder.encode(text + "a question", False, new_chars_max=3000) is not None
    assert encoder.encode("Other" + text, False, new_chars_max=3000) is None


@pytest.mark.parametrize("kind", ["Llama 3", "Qwen 2"])
def test_behind_known_text_only_what_is_new_is_tokenised(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(kind)
    encoder = EncoderMaker(tokenizer)(1 << 20)
    known = "The long known line that comes first\n" * 20
    encoder.encode(known + "Another question was asked here before", True)
    tokenised: list[str] = []

    def watched(tokenizer: Tokenizer, texts: list[str], special: bool) -> list[TokenIds]:
        tokenised.extend(texts)
        return encode_all(tokenizer, texts, special)

    monkeypatch.setattr("gateway.prompts.tokenizer.encoder.encode_all", watched)
    text = known + "What was it that you did not ask?"
    assert encoder.encode(text, True) == whole(tokenizer, text, True)
    assert 0 < sum(map(len, tokenised)) < 200
    assert encoder.encode(text, True) == whole(tokenizer, text, True)
    assert sum(map(len, tokenised)) < 200


def test_bos_is_put_before_a_text_and_eos_behind_it() -> None:
    tokenizer = Tokenizer.from_str(tokenizer_of("Qwen 2").to_str())
    assert find_affixes(tokenizer) == ([tokenizer.token_to_id(SPECIALS[0])], [])


def test_the_cache_forgets_the_least_recently_used_text_first() -> None:
    one, entry = TokenIds.of([1, 2, 3, 4]), ENTRY_BYTES + 4 * 11
    cache = IdCache(2 * entry)
    cache.put([(b"a", one), (b"b", one)])
    assert cache.get([b"a"]) == [one]
    cache.put([(b"c", one)])
    assert cache.get([b"a", b"b", b"c"]) == [one, None, one]
    assert (len(cache), cache.held_bytes) == (2, 2 * entry)
    cache.put([(b"a", TokenIds.of([5]))])
    assert (cache.get([b"a"]), cache.held_bytes) == ([TokenIds.of([5])], entry + ENTRY_BYTES + 11)
