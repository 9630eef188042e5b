"""Without the ids of known words: what follows a known beginning is tokenised."""

from collections.abc import Sequence

from gateway.prompts.tokenizer.word_ids import WordIds


def _raw(self: WordIds, texts: Sequence[str], new_chars_max: int | None = None) -> bytes | None:
    return b"".join([found.raw for found in self._tokenise(list(texts))])


WordIds.raw = _raw  # type: ignore[method-assign]
