"""An encoder for each tenant: from the time that tokenising takes, nobody can tell what another tenant sent before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

from tokenizers import Tokenizer

from gateway.prompts.tokenizer.encoder import Encoder
from transport.table.quality import exact_salt

TENANTS_KEPT_MAX = 16
"""Each has an equal share of the caches' bytes; of more tenants the one that was away for longest begins anew."""
WORDS_KEPT = 10_000
"""Of a vocabulary, the first ones being the most frequent: as many as a BPE remembers by itself."""
_SPACES = ("Ġ", "▁")

MakeEncoder = Callable[[int, int], Encoder]


class TenantEncoders:
    """Thread safe. `make` gives an encoder whose caches may hold so many bytes of ids and so many of texts.

    `tenants` says how many there are by the operator's settings, 0 where nobody needs a key. The shares depend on that alone,
    and not on what others leave over, for that could be measured too: what one tenant does changes another's share in nothing,
    and of more than TENANTS_KEPT_MAX tells only that others are there. There is a power of two of shares; when tenants become
    more than that, all begin anew with smaller ones. `freeze` is called before the first of them.
    """

    def __init__(
        self,
        make: MakeEncoder,
        tenants: Callable[[], int],
        cache_bytes_max: int,
        texts_bytes_max: int,
        freeze: Callable[[], None] = lambda: None,
    ) -> None:
        self._make = make
        self._tenants = tenants
        self._bytes_max = cache_bytes_max, texts_bytes_max
        self._freeze = freeze
        self._encoders: OrderedDict[str, Encoder] = OrderedDict()
        self._lock = Lock()
        self._shares = 0
        self._divide(tenants())

    def of(self, tenant: str) -> Encoder:
        """Return the encoder of a tenant, named by its salt: it has one, whether its caller accepts loss or not.

        "" is everybody where nobody needs a key; else the gateway itself, whose few texts are in no tenant's share.
        """
        tenant = exact_salt(tenant)
        with self._lock:
            if self._shares < TENANTS_KEPT_MAX and (count := self._tenants()) > self._shares:
                self._divide(count)
            if not tenant:
                return self._of_nobody
            encoder = self._encoders.get(tenant)
            if encoder is None:
                encoder = self._encoders[tenant] = self._make(*self._share)
                if len(self._encoders) > max(1, self._shares):
                    self._encoders.popitem(last=False)
            else:
                self._encoders.move_to_end(tenant)
        return encoder

    def _divide(self, tenants: int) -> None:
        if tenants and not self._shares:
            self._freeze()
        self._shares = min(1 << (tenants - 1).bit_length(), TENANTS_KEPT_MAX) if tenants else 0
        ids, texts = self._bytes_max
        self._share = ids // max(1, self._shares), texts // max(1, self._shares)
        self._encoders.clear()
        self._of_nobody = self._make(*self._share)


def freeze_words(tokenizer: Tokenizer) -> None:
    """Have the tokenizer remember words of its vocabulary, and from now on no others.

    A BPE keeps the first words that it meets in a cache of its own, which all who use it share.
    """
    resize, clear = (getattr(tokenizer.model, name, None) for name in ("_resize_cache", "_clear_cache"))
    if resize is None or clear is None:
        return
    clear()
    resize(2 * WORDS_KEPT)
    entries = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda entry: entry[1])
    words = [text[1:] for text, _ in entries if text.startswith(_SPACES) and text[1:].isalpha()][:WORDS_KEPT]
    if words:
        tokenizer.encode_batch_fast([" " + " ".join(words)], add_special_tokens=False)
    resize(0)
