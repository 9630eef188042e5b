"""An encoder for each tenant: from the time that tokenising takes, nobody can tell what another tenant sent before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

from tokenizers import Tokenizer

from gateway.prompts.tokenizer.encoder import Encoder

TENANTS_KEPT_MAX = 16
"""Each has an equal share of the caches' bytes; of more tenants the one that was away for longest begins anew."""
WORDS_KEPT = 10_000
"""Of a vocabulary, the first ones being the most frequent: as many as a BPE remembers by itself."""
_SPACES = ("Ġ", "▁")

MakeEncoder = Callable[[int, int], Encoder]


class TenantEncoders:
    """Thread safe. `make` gives an encoder whose caches may hold so many bytes of ids and so many of texts.

    `tenants` is how many there may be. The shares are fixed and not what others leave over, for that could be measured too:
    what one tenant does changes another's share in nothing, and of more than TENANTS_KEPT_MAX tells only that others are there.
    """

    def __init__(self, make: MakeEncoder, tenants: int, cache_bytes_max: int, texts_bytes_max: int) -> None:
        self._make = make
        self._kept_max = max(1, min(tenants, TENANTS_KEPT_MAX))
        self._bytes = cache_bytes_max // self._kept_max, texts_bytes_max // self._kept_max
        self._encoders: OrderedDict[str, Encoder] = OrderedDict()
        self._lock = Lock()
        self._only = make(*self._bytes) if tenants <= 1 else None

    def of(self, tenant: str) -> Encoder:
        """Return the tenant's own encoder."""
        if self._only is not None:
            return self._only
        with self._lock:
            encoder = self._encoders.get(tenant)
            if encoder is None:
                encoder = self._encoders[tenant] = self._make(*self._bytes)
                if len(self._encoders) > self._kept_max:
                    self._encoders.popitem(last=False)
            else:
                self._encoders.move_to_end(tenant)
        return encoder


def freeze_words(tokenizer: Tokenizer) -> None:
    """Have the tokenizer remember words of its vocabulary, and from now on no others.

    A BPE keeps the first words that it meets in a cache of its own, which all who use it share.
    """
    resize = getattr(tokenizer.model, "_resize_cache", None)
    if resize is None:
        return
    resize(2 * WORDS_KEPT)
    entries = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda entry: entry[1])
    words = [text[1:] for text, _ in entries if text.startswith(_SPACES) and text[1:].isalpha()][:WORDS_KEPT]
    if words:
        tokenizer.encode_batch_fast([" " + " ".join(words)], add_special_tokens=False)
    resize(0)
