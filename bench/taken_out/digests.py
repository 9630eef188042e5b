"""Without ids under digests of their text: a long text's second coming is tokenised like the first."""

from collections.abc import Sequence

from gateway.prompts.tokenizer.id_cache import IdCache
from gateway.token_ids import TokenIds


def _get(self: IdCache, keys: Sequence[bytes]) -> list[TokenIds | None]:
    return [None] * len(keys)


IdCache.get = _get  # type: ignore[method-assign]
