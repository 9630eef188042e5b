"""The prompts of attempts that are over, but whose records may still come: their losses are judged by what they were."""

from collections import OrderedDict

from gateway.ledger.attempts import Entry

PROMPTS_BYTES_MAX = 256 << 20


class WaitingPrompts:
    """Entries that keep their token ids. Over `bytes_max` the oldest lose them: they are judged without their history."""

    def __init__(self, bytes_max: int = PROMPTS_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, entry: Entry) -> None:
        """Let an attempt that waits for its record keep its prompt."""
        self._entries[entry.planned.tag] = entry
        self._bytes += _held_bytes(entry)
        while self._bytes > self._bytes_max:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= _held_bytes(oldest)
            oldest.ids = None

    def drop(self, entry: Entry) -> None:
        """An attempt waits no longer."""
        if self._entries.pop(entry.planned.tag, None) is not None:
            self._bytes -= _held_bytes(entry)


def _held_bytes(entry: Entry) -> int:
    """Four bytes a token id, all counted, though most are shared with the cache of token ids."""
    return 4 * len(entry.ids) if entry.ids is not None else 0
