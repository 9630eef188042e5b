"""Without known beginnings of texts: they are found by the digests of their chunks."""

from collections.abc import Sequence

from gateway.prompts.tokenizer.known_prefixes import KnownPrefixes
from gateway.token_ids import TokenIds


def _leading(self: KnownPrefixes, text: str) -> tuple[int, list[TokenIds]]:
    return 0, []


def _note(self: KnownPrefixes, text: str, chunks: Sequence[str] = (), ids: Sequence[TokenIds] = ()) -> None:
    pass


KnownPrefixes.leading = _leading  # type: ignore[method-assign]
KnownPrefixes.note = _note  # type: ignore[method-assign]
