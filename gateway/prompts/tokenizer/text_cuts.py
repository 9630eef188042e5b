"""Where a prompt's text can be cut so that its parts, tokenised one by one, give the ids of the whole. Pure.

Three kinds of place:

- line: behind a single newline that follows a character that is no whitespace, before a letter;
- word: behind an ASCII letter, or any ASCII character but spaces and controls, before a space that an ASCII letter follows;
- token: before a special token.

A pre-tokeniser's regular expression is a list of alternatives, tried in order from left to right, without look-behind. Of
each alternative in `_ALTERNATIVES` two things hold at a line or word place: no match begins before the place and ends behind
it, and what matches before the place does not depend on what follows. The one exception is `\\s+(?!\\S)`: it takes the newline
of a line place only if the text ends there; `\\s+`, demanded beside it, takes the same newline otherwise. So the pieces before
a place are the same with and without the text behind it, a piece begins at the place, and BPE, which sees pieces one by one,
cannot tell. Normal forms change neither side: newline, space and ASCII letters compose with nothing before them.

A BPE without pieces (Gemma's, with "▁" for a space) merges across a place only into a token that contains the place; the
vocabulary is searched for such. Added tokens are split off before everything else, leftmost longest: none may contain a place,
and none that looks at its surroundings may begin or end with what stands at one.

Whatever is not known to be of these kinds is not cut.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

CHUNK_CHARS_MIN = 2048
"""A chunk ends at the first place from here on. Shorter ones cost more to look up, longer ones more to tokenise anew."""
CHUNK_CHARS_MAX = 65536
"""Without a place up to here the rest of the text is one chunk: looking further would cost more than it saves."""
LAST_PLACE_CHARS = 512
_SPECIAL_CHARS_MAX = 256

# Letters of old, none of them a mark, and each begins with a letter in every normal form.
_LETTER = "A-Za-zÀ-ÖØ-öø-ÿΑ-ΡΣ-Ωα-ωА-яء-غぁ-ゖァ-ヺ一-鿋가-힣"
# What follows the first character of a match, which the search looks for by itself.
_LINE = rf"(?<=[^\s\x00-\x1f]\n)(?=[{_LETTER}])"
_LINE_WITHIN = re.compile(rf"\n[{_LETTER}]")
_ASCII = [chr(code) for code in range(128)]
_LETTERS = frozenset(ascii_letters)
WORD_ENDS = ("!-~", "A-Za-z")
"""What may stand before a word place, as a class of a regular expression: the first one that no token reaches over."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SPACES_BEFORE_MORE, _SPACES = r"\s+(?!\S)", r"\s+"
# Those of GPT-2, cl100k, o200k, Llama 3, Qwen 2 to 3.5, Mistral's Tekken and DeepSeek.
_ALTERNATIVES = frozenset(
    (
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _CONTRACTIONS, "'(?i:[sdmt]|ll|ve|re)"),
        *(
            r" ?\p{L}+",
            r"\p{L}+",
            r"[^\r\n\p{L}\p{N}]?\p{L}+",
            r"[^\r\n\p{L}\p{N}]?+\p{L}+",
            r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        ),
        *(_CASED[0], _CASED[1], f"{_CASED[0]}{_CONTRACTIONS}?", f"{_CASED[1]}{_CONTRACTIONS}?"),
        *(r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"),
        *(r" ?\p{N}+", r"\p{N}+", r"\p{N}", r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+"),  # noqa: RUF001
        *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
        *(r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r" ?[\p{P}\p{S}]+[\r\n]*"),
        *(r"\s*[\r\n]+", _SPACES_BEFORE_MORE, _SPACES),
    )
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_NORMAL_FORMS = frozenset(("NFC", "NFD", "NFKC", "NFKD"))


@dataclass(frozen=True, slots=True)
class Places:
    """Which places may be cut at: of lines, of words that end with which characters ("": none), before which special tokens."""

    lines: bool
    words: str
    specials: tuple[str, ...]

    def pattern(self) -> str:
        """Return a regular expression that finds them; a match that begins with a newline marks the place behind that.

        A class of characters comes first, for which the search is quick, and then whether there is a place.
        """
        firsts = "".join(sorted({*"\n" * self.lines, *" " * bool(self.words), *(text[0] for text in self.specials)}))
        rest = [_LINE] * self.lines + [f"(?<=[{self.words}] )(?=[A-Za-z])"] * bool(self.words)
        rest += [f"(?<={re.escape(text[0])}){re.escape(text[1:])}" for text in self.specials]
        return f"[{re.escape(firsts)}](?:{'|'.join(rest)})"

    def pattern_there(self) -> str:
        """Return a regular expression that matches, with no character, at the very place."""
        found = [_LINE] * self.lines + [f"(?<=[{self.words}])(?= [A-Za-z])"] * bool(self.words)
        return "|".join([*found, *[f"(?={re.escape(text)})" for text in self.specials]])


class TextCuts:
    """Cuts texts into chunks, from the front, so that equal beginnings give equal chunks."""

    def __init__(self, places: Places, chars_min: int = CHUNK_CHARS_MIN, chars_max: int = CHUNK_CHARS_MAX) -> None:
        self.places = places
        pattern = re.compile(places.pattern())
        self._search, self._each = pattern.search, pattern.finditer
        self._match = re.compile(places.pattern_there()).match
        self._word_ends = frozenset(filter(re.compile(f"[{places.words}]").match, _ASCII) if places.words else ())
        self._chars_min = chars_min
        self._chars_max = chars_max

    def sized(self, chars_min: int, chars_max: int = CHUNK_CHARS_MAX) -> "TextCuts":
        """Return one for the same places that makes chunks of another size."""
        return TextCuts(self.places, chars_min, chars_max)

    def chunks(self, text: str) -> list[str]:
        """Return the chunks of `text` in order; joined they are the text. None is empty unless the text is."""
        search, chars_min, chars_max = self._search, self._chars_min, self._chars_max
        found, start, end = [], 0, len(text)
        while end - start > chars_min:
            match = search(text, start + chars_min, min(end, start + chars_max))
            if match is None:
                break
            place = match.start()
            if text[place] == "\n":
                place += 1
            found.append(text[start:place])
            start = place
        if start < end or not found:
            found.append(text[start:])
        return found

    def at(self, text: str, place: int) -> bool:
        """Tell whether there is a place, `place` being above 0."""
        # a word place, as most are, is found in a fraction of the time that the expression takes
        if text[place : place + 1] == " " and text[place + 1 : place + 2] in _LETTERS and text[place - 1] in self._word_ends:
            return True
        return self._match(text, place) is not None

    def last_place(self, text: str, start: int, end: int) -> int:
        """Return the last place of `text` from `start` to `end`, 0 if none is among the last LAST_PLACE_CHARS of these."""
        if self.at(text, end):
            return end
        place = 0
        for match in self._each(text, max(start, end - LAST_PLACE_CHARS), end + 1):
            place = match.start() + (text[match.start()] == "\n")
        return place


def find_cuts(tokenizer: Tokenizer) -> TextCuts | None:
    """Return where texts for `tokenizer` can be cut, None if it is of no kind for which that is known."""
    added = list(tokenizer.get_added_tokens_decoder().values())
    model = tokenizer.model
    if not isinstance(model, models.BPE) or any(_reaches_out(tokenizer, token) for token in added):
        return None
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    normalizers = _steps(tokenizer.normalizer, "normalizers")
    splits = _steps(tokenizer.pre_tokenizer, "pretokenizers")
    within = list(_contents(tokenizer, added))
    marks = [step for step in normalizers if step["type"] not in _NORMAL_FORMS]
    if marks:
        if model.ignore_merges:  # tokens that merges do not lead to may begin with a space and go on behind a place
            return None
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        one_piece = all(map(_marks_spaces, marks)) and all(map(_splits_at_spaces, splits))
        if not one_piece or not {"\n", "▁"} <= vocabulary.keys():  # unknown characters may fuse
            return None
        within += vocabulary
    elif not _bounds_places(splits):
        return None
    lines = not any(map(_LINE_WITHIN.search, within))
    words = next((ends for ends in WORD_ENDS if not any(map(re.compile(f"[{ends}][ ▁]").search, within))), "")
    if any(token.rstrip or token.single_word for token in added):  # they end with none of these (see _reaches_out)
        words = words and WORD_ENDS[-1]
    specials = () if tokenizer.encode_special_tokens else tuple(_specials_to_cut_at(added))
    return TextCuts(Places(lines, words, specials)) if lines or words or specials else None


def _steps(stage: Any, name: str) -> list[Mapping[str, Any]]:
    """Return the steps of a normaliser or pre-tokeniser, as tokenizer.json has them."""
    if stage is None:
        return []
    waiting, steps = [json.loads(stage.__getstate__())], []
    while waiting:
        step = waiting.pop(0)
        if step["type"] == "Sequence":
            waiting[:0] = step[name]
        else:
            steps.append(step)
    return steps


def _contents(tokenizer: Tokenizer, added: Iterable[AddedToken]) -> Iterator[str]:
    """Yield what the added tokens match: their content, as it is and as the normaliser leaves it."""
    for token in added:
        yield token.content
        if tokenizer.normalizer is not None:
            yield tokenizer.normalizer.normalize_str(token.content)


def _reaches_out(tokenizer: Tokenizer, token: AddedToken) -> bool:
    """Tell whether an added token looks at its surroundings, or takes them, and has an edge that may stand at a place."""
    matched = list(_contents(tokenizer, [token])) if token.normalized else [token.content]
    edges = [edge for text in matched for edge in (text[:1], text[-1:])]
    looks = token.lstrip or token.rstrip or token.single_word
    return not all(matched) or (looks and any(edge.isalnum() or edge.isspace() for edge in edges))


def _marks_spaces(step: Mapping[str, Any]) -> bool:
    return (step["type"], step.get("pattern"), step.get("content")) == ("Replace", {"String": " "}, "▁")


def _splits_at_spaces(step: Mapping[str, Any]) -> bool:
    """Tell whether a pre-tokeniser only splits at spaces, of which the normaliser has left none."""
    return (step["type"], step.get("pattern")) == ("Split", {"String": " "})


def _bounds_places(splits: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether pre-tokenisers put a boundary at each place, whatever stands around it, and treat both sides apart."""
    bounded = False
    for step in splits:
        pattern = _pattern(step)
        if pattern is None:
            return False
        if pattern:
            alternatives = set(_alternatives(pattern))
            if not alternatives <= _ALTERNATIVES:
                return False
            if _SPACES in alternatives:  # whatever else is not matched, the newline or space at a place is
                bounded = True
            elif _SPACES_BEFORE_MORE in alternatives:
                return False
    return bounded


def _pattern(step: Mapping[str, Any]) -> str | None:
    """Return the regular expression whose matches a pre-tokeniser isolates, "" for none; None if it is of another kind."""
    match step["type"]:
        case "Digits":
            return r"\p{N}"
        case "ByteLevel" if not step["add_prefix_space"]:
            return _GPT2 if step.get("use_regex", True) else ""
        case "Split" if step["behavior"] == "Isolated" and not step["invert"]:
            found: str | None = step["pattern"].get("Regex")
            return found
        case _:
            return None


def _alternatives(pattern: str) -> Iterator[str]:
    """Yield the alternatives of a regular expression: the parts between its outermost bars."""
    start = depth = 0
    in_class = escaped = False
    for place, char in enumerate(pattern):
        if escaped or char == "\\":
            escaped = not escaped
        elif in_class or char == "[":
            in_class = char != "]"
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "|" and depth == 0:
            yield pattern[start:place]
            start = place + 1
    yield pattern[start:]


def _specials_to_cut_at(added: Sequence[AddedToken]) -> Iterator[str]:
    """Yield special tokens that are always found where their text begins, and change nothing before it.

    Their first character stands nowhere further inside of an added token, is no letter or the like, and none of those that
    begin with it looks around.
    """
    inside = set("".join(token.content[1:] for token in added))
    looking = {token.content[0] for token in added if token.lstrip or token.single_word}
    for token in added:
        first = token.content[0]
        plain = token.special and not token.normalized and len(token.content) <= _SPECIAL_CHARS_MAX
        if plain and first not in inside | looking | {"\n", " "} and not (first.isalnum() or first.isspace() or first == "_"):
            yield token.content
