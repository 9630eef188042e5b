"""Prompts of an exact number of tokens, made of random words."""

import random
import re
from pathlib import Path

from tokenizers import Tokenizer

_WORD = re.compile(r"Ġ[a-z]{3,}")


class Words:
    """Prompts of words that are one token each. No two of them share a prefix of more than a few words."""

    def __init__(self, model_dir: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        known = self.tokenizer.get_vocab()
        self._ids = sorted(token for word, token in known.items() if _WORD.fullmatch(word))
        self._random = random.SystemRandom()

    def ids(self, tokens: int) -> list[int]:
        """A prompt as token ids."""
        return self._random.choices(self._ids, k=tokens)

    def choices(self, tokens: int, seed: str) -> list[int]:
        """Token ids that are the same for the same seed."""
        return random.Random(seed).choices(self._ids, k=tokens)

    def text(self, tokens: int) -> str:
        """A prompt as text that the tokenizer turns into exactly `tokens` ids."""
        text: str = self.tokenizer.decode(self.ids(tokens))
        assert len(self.encode(text)) == tokens
        return text

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=True).ids
        return ids
