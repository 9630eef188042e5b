"""Tokenizers of the kinds that models use, trained here on a few texts."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from tests.unit.gateway.prompts.tiny_model import tiny_tokenizer

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = rf"{_WORDS[0]}{_ENDINGS}|{_WORDS[1]}{_ENDINGS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"{_WORDS[0]}|{_WORDS[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ("<|bos|>", "<|im_start|>", "<|im_end|>", "<pad>")
VOCABULARY = 1500

_TEXTS = (
    (Path(__file__).parents[5] / "README.md").read_text("utf-8"),
    "don't HE'LL we've\n" * 20,
    "中文的一行。\n第二行。\nかがみ 한국어 Ελλάδα Россия مرحبا e\u0301 A\u0308\n" * 20,
    "  \n\n\t\r\n" * 40,
)


def _byte_level(*splits: str, normalizer: normalizers.Normalizer | None = None, digits: bool = False) -> Tokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    steps += [pre_tokenizers.Digits(individual_digits=True)] * digits
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits))
    tokenizer = Tokenizer(models.BPE(ignore_merges=bool(splits)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return _trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def _trained(tokenizer: Tokenizer, alphabet: list[str], *added: AddedToken) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    tokenizer.add_tokens(list(added))
    bos = tokenizer.token_to_id(SPECIALS[0])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{SPECIALS[0]} $A", special_tokens=[(SPECIALS[0], bos)])
    return tokenizer


def _gemma(*, words: bool) -> Tokenizer:
    """One piece a text; with `words` it is trained word by word, so that no token reaches over a space."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        "▁" if words else " ", "merged_with_next" if words else "merged_with_previous"
    )
    trained = _trained(tokenizer, ["▁", "\n"])
    trained.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return trained


def _llama2() -> Tokenizer:
    tokenizer = _gemma(words=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def _metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return _trained(tokenizer, ["▁"])


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, unk_token="<unk>", special_tokens=["<unk>", *SPECIALS], show_progress=False
    )
    tokenizer.train_from_iterator([text[:4000] for text in _TEXTS], trainer)
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=800, special_tokens=["[UNK]", *SPECIALS], show_progress=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def _prefix_space() -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def _greedy_added_token() -> Tokenizer:
    tokenizer = _byte_level(LLAMA3)
    tokenizer.add_tokens([AddedToken("mask", lstrip=True)])
    return tokenizer


def _roberta() -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    return tokenizer


def _added_across_places() -> Tokenizer:
    tokenizer = _byte_level(LLAMA3)
    tokenizer.add_tokens([AddedToken("end of line"), AddedToken(".\nThe")])
    return tokenizer


CUT: Mapping[str, Callable[[], Tokenizer]] = {
    "GPT-2": _byte_level,
    "SmolLM2": lambda: _byte_level(digits=True),
    "Llama 3": lambda: _byte_level(LLAMA3),
    "Qwen 2": lambda: _byte_level(QWEN2, normalizer=normalizers.NFC()),
    "Qwen 3.5": lambda: _byte_level(QWEN35, normalizer=normalizers.NFC()),
    "o200k": lambda: _byte_level(O200K),
    "Tekken": lambda: _byte_level(TEKKEN),
    "DeepSeek": lambda: _byte_level(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK),  # noqa: RUF001
    "NFKD": lambda: _byte_level(LLAMA3, normalizer=normalizers.NFKD()),
    "Gemma": lambda: _gemma(words=True),
    "Gemma with tokens across words": lambda: _gemma(words=False),
    "RoBERTa's mask": _roberta,
    "added across places": _added_across_places,
    "tiny": tiny_tokenizer,
}
"""Kinds whose texts can be cut."""
WHOLE: Mapping[str, Callable[[], Tokenizer]] = {
    "Llama 2": _llama2,
    "Metaspace": _metaspace,
    "Unigram": _unigram,
    "WordPiece": _wordpiece,
    "prefix space": _prefix_space,
    "an added token that eats spaces": _greedy_added_token,
    "another regular expression": lambda: _byte_level(r"\w+\n\w+|\s+|."),
    "a lookahead alone": lambda: _byte_level(r"\p{L}+|\s+(?!\S)"),
}
"""Kinds of which that is not known, or not so."""


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """Return the tokenizer of that kind, trained once."""
    return {**CUT, **WHOLE}[kind]()
