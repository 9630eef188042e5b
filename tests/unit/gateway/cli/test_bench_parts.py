"""The pure parts of `peerkv bench`: kinds, lengths, arrivals, words, spreads."""

import io
import random

import pytest
from rich.console import Console

from gateway.cli.bench.arrivals import arrivals, modest_rate, shared_prefixes
from gateway.cli.bench.installation import Answer, PromptTokens
from gateway.cli.bench.kinds import Kind, Sample, kind_of, rows
from gateway.cli.bench.lengths import choose_lengths
from gateway.cli.bench.report import first_token_table
from gateway.cli.bench.results import hidden
from gateway.cli.bench.spread import Spread, quantile, spread
from gateway.cli.bench.throughput import summary
from gateway.cli.bench.words import COMMON, Words


@pytest.mark.parametrize(
    ("prompt", "local", "peer", "kind"),
    [
        (1000, 0, 0, Kind.COLD),
        (1000, 992, 0, Kind.LOCAL),
        (1000, 0, 992, Kind.IMPORT),
        (1000, 16, 976, Kind.IMPORT),
        (1000, 500, 0, None),
        (1000, 0, 500, None),
        (1000, 968, 0, Kind.LOCAL),
        (1000, 967, 0, None),
    ],
)
def test_a_prompt_is_of_the_kind_that_its_cached_tokens_make_it(prompt: int, local: int, peer: int, kind: Kind | None) -> None:
    assert kind_of(prompt, local, peer, 16) is kind


def sample(wanted: Kind, got: Kind | None, seconds: float, tokens: int = 1000) -> Sample:
    return Sample(tokens, wanted, got, "replica-0", tokens + 5, 0, 0, seconds)


def test_only_samples_that_were_what_they_should_be_are_counted() -> None:
    found = rows(
        [
            sample(Kind.COLD, Kind.COLD, 3.0),
            sample(Kind.COLD, Kind.COLD, 1.0),
            sample(Kind.COLD, Kind.LOCAL, 0.1),
            sample(Kind.IMPORT, Kind.IMPORT, 0.5),
            sample(Kind.LOCAL, None, 0.7),
            sample(Kind.LOCAL, Kind.LOCAL, 0.2, tokens=50),
        ]
    )
    assert [(row.tokens, row.prompt_tokens) for row in found] == [(50, 55), (1000, 1005)]
    assert found[1].seconds == {Kind.COLD: Spread(2.0, 1.0, 3.0, 2), Kind.IMPORT: Spread(0.5, 0.5, 0.5, 1)}
    assert found[1].ratio(Kind.COLD, Kind.IMPORT) == 4.0
    assert found[1].ratio(Kind.IMPORT, Kind.LOCAL) is None


def test_lengths_are_the_longest_that_fit_context_and_time() -> None:
    assert choose_lengths(8192, 0.002, 5, 60.0) == [500, 1000, 2000][: len(choose_lengths(8192, 0.002, 5, 60.0))]
    assert choose_lengths(131072, 1e-5, 5, 60.0) == [32000, 64000, 128000]
    assert choose_lengths(2048, 1e-5, 5, 60.0) == [250, 500, 1000]
    assert choose_lengths(8192, 1.0, 5, 60.0) == [250]
    assert choose_lengths(200, 1e-5, 5, 60.0) == [100]


def test_chosen_lengths_stay_within_the_time() -> None:
    for seconds_per_token in (1e-5, 1e-4, 1e-3, 2e-3):
        assert sum(choose_lengths(1 << 20, seconds_per_token, 5, 60.0)) * seconds_per_token * 5 <= 60.0


def test_arrivals_come_at_the_rate_and_in_order() -> None:
    times = arrivals(random.Random(1), 50.0, 100.0)
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 100.0
    assert 4700 < len(times) < 5300


def test_requests_share_beginnings_and_have_ends_of_their_own() -> None:
    source = random.Random(2)
    planned = shared_prefixes(source, Words(source), [0.5] * 40, prefixes=3, prefix_tokens=100, suffix_tokens=20)
    prompts = [arrival.prompt.split() for arrival in planned]
    assert len({tuple(words[:100]) for words in prompts}) == 3
    assert len({tuple(words[100:]) for words in prompts}) == 40
    assert {len(words) for words in prompts} == {120}


def test_a_modest_rate_is_less_than_the_replicas_could_do() -> None:
    assert modest_rate(2, 1.0) == 1.2
    assert modest_rate(8, 0.0123) == 390.0


def test_words_know_how_many_tokens_they_take() -> None:
    words = Words(random.Random(3), tokens_each=2.0)
    assert len(words.text(100).split()) == 50
    assert len(words.text(1).split()) == 1
    assert set(words.text(5000).split()) <= set(COMMON)
    assert words.text(40) != words.text(40)


def test_quantiles_are_values_that_occurred() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [quantile(values, share) for share in (0.0, 0.5, 0.9, 0.99, 1.0)] == [1.0, 50.0, 90.0, 99.0, 100.0]
    assert spread([]) is None
    with pytest.raises(ValueError, match="no quantile"):
        quantile([], 0.5)


def test_a_run_is_summed_up_by_its_answers_and_failures_count_as_requests() -> None:
    answers = [Answer(first / 10, first, 100, 0, 0, 8) for first in (1.0, 2.0, 3.0, 4.0)]
    found = summary(answers, 1, 2.0, 4.0, PromptTokens(300, 0, 100))
    assert (found.requests, found.failures, found.requests_per_second) == (5, 1, 1.0)
    assert (found.prompt_tokens_per_second, found.answer_tokens_per_second) == (100.0, 8.0)
    assert (found.first_p50, found.first_p90, found.whole_p50) == (0.2, 0.4, 2.0)


def test_keys_are_not_written_into_results() -> None:
    given = ["--api-key", "secret-1", "--admin-key=secret-2", "--samples", "3"]
    assert hidden(given) == ["--api-key", "…", "--admin-key=…", "--samples", "3"]


def test_the_table_fits_into_eighty_columns() -> None:
    long = [sample(kind, kind, 123.456, tokens=128_000) for kind in Kind]
    console = Console(file=io.StringIO(), width=80, no_color=True)
    console.print(first_token_table(rows(long)))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert "…" not in console.file.getvalue()
    assert any("128,005 local hit" in line and line.rstrip().endswith("1.00 1.00") for line in map(_squeezed, lines)), lines


def _squeezed(line: str) -> str:
    return " ".join(line.split())
