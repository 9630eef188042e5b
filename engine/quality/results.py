"""What is measured, as it goes to `peerkv quality` and into a file: lines of JSON, each a Line."""

import msgspec


class Given(msgspec.Struct, frozen=True):
    """What was asked for; lengths in tokens."""

    model: str
    codecs: tuple[str, ...]
    documents: int = 8
    prefix_tokens: int = 512
    scored_tokens: int = 128
    greedy_tokens: int = 32
    block_size: int = 16


class Row(msgspec.Struct, frozen=True):
    """The figures of one arm. Divergences are KL of the next token's distribution from that with raw KV, in nats.

    `token_bytes` counts everything that a frame has; `equal_tokens` is the median length of equal greedy answers, at most
    Given.greedy_tokens; changes of perplexity are relative, low and high those of 95 %; decibels are None without noise.
    """

    name: str
    quality: str
    token_bytes: float
    divergence_mean: float
    divergence_p99: float
    agreement: float
    perplexity: float
    perplexity_change: float
    perplexity_change_low: float
    perplexity_change_high: float
    equal_tokens: float
    keys_decibels: float | None
    values_decibels: float | None


class Results(msgspec.Struct, frozen=True):
    """Everything."""

    given: Given
    documents: int
    seconds: float
    rows: tuple[Row, ...]


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line: progress (`done` of `total`, in words), the end, or why there is none."""

    done: int = 0
    total: int = 0
    words: str = ""
    results: Results | None = None
    error: str = ""
