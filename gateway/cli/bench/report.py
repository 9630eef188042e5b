"""Results for people: tables on a terminal, a chart as SVG."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gateway.cli.bench.kinds import Kind, Row, rows
from gateway.cli.bench.overhead import Overhead
from gateway.cli.bench.results import Results
from gateway.cli.bench.spread import Spread
from gateway.cli.bench.throughput import Throughput
from gateway.cli.plot import line_chart

TITLE_COLUMNS = 60


def print_results(results: Results, console: Console) -> None:
    """Print the results there are."""
    described = results.described
    if described is not None:
        console.print(
            f"{described.model}, {len(described.replicas)} replicas on {described.device.partition(':')[0] or '?'}, "
            f"peerkv {described.version}",
            style="bold",
        )
    if results.samples:
        console.print(first_token_table(rows(results.samples)))
    if results.overhead is not None:
        console.print(overhead_table(results.overhead))
    if results.throughput is not None:
        console.print(throughput_table(results.throughput))
    for note in results.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, min_width=TITLE_COLUMNS, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def first_token_table(found: Sequence[Row]) -> Table:
    """Return a line per length and kind; the last columns say how many times faster it was than cold and than an import."""
    heads = ("prompt", "kind", "median", "least", "most", "n", "cold/this", "import/this")
    table = _table("seconds to the first token, prompts in tokens", *heads)
    for row in found:
        for kind, each in row.seconds.items():
            times = [_short(value) for value in (each.median, each.least, each.most)]
            sooner = {Kind.COLD: (), Kind.IMPORT: (Kind.COLD,), Kind.LOCAL: (Kind.COLD, Kind.IMPORT)}[kind]
            ratios = [_ratio(row.ratio(slower, kind)) for slower in sooner]
            table.add_row(f"{row.prompt_tokens:,}", kind.value, *times, str(each.count), *ratios)
        table.add_section()
    return table


def overhead_table(found: Overhead) -> Table:
    """Milliseconds of small requests."""
    table = _table("a small request, milliseconds: median (least to most)", "one token of answer", "")
    table.add_row("through the gateway", with_spread(found.through, 1e3))
    if found.direct is not None and found.added is not None:
        table.add_row("directly to the replica", with_spread(found.direct, 1e3))
        table.add_row("the gateway adds (in pairs)", with_spread(found.added, 1e3))
    table.add_row("answered by the gateway itself", with_spread(found.round_trip, 1e3))
    return table


def throughput_table(found: Throughput) -> Table:
    """An open-loop run."""
    table = _table(f"{found.requests} requests at {found.rate:g} per second, shared prefixes, open loop", "", "")
    table.add_row("requests/s answered", f"{found.requests_per_second:.2f}")
    table.add_row("prompt tokens/s", f"{found.prompt_tokens_per_second:,.0f}")
    table.add_row("answer tokens/s", f"{found.answer_tokens_per_second:,.1f}")
    table.add_row("first token p50, p90, p99", f"{found.first_p50:.3f}, {found.first_p90:.3f}, {found.first_p99:.3f} s")
    table.add_row("whole answer p50", f"{found.whole_p50:.3f} s")
    tokens = found.tokens
    table.add_row("tokens local, import, computed", f"{tokens.local:,}, {tokens.peer:,}, {tokens.computed:,}")
    table.add_row("failed requests", str(found.failures))
    return table


def with_spread(found: Spread | None, scale: float = 1.0) -> str:
    """A median with least and most; a dash for none."""
    if found is None:
        return "-"
    return f"{_short(found.median * scale)} ({_short(found.least * scale)} to {_short(found.most * scale)})"


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def picture(results: Results) -> str:
    """Time to the first token by prompt length and kind, as SVG. Raises ValueError if there is nothing to draw."""
    found = rows(results.samples)
    lines = {
        kind.value: [(float(row.prompt_tokens), row.seconds[kind].median) for row in found if kind in row.seconds]
        for kind in Kind
    }
    model = results.described.model if results.described else ""
    drawn = {name: points for name, points in lines.items() if points}
    return line_chart(f"Time to the first token, {model}", "prompt tokens", "seconds, median", drawn)
