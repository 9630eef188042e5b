"""`peerkv kv stats`: the figures of a running gateway as a live table, a single table, or JSON."""

import argparse
import json
import sys
import time
from collections.abc import Callable

import httpx
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from engine.fleet import ReplicaState
from gateway.cli.asking import CommandFailed, add_gateway_flags, ask, client_for, read
from gateway.ledger.stats import LedgerStats
from gateway.stats.shapes import KvStats, ReplicaStats, TokenCounts, Totals

GIB = 1 << 30
INTERVAL_SECONDS = 1.0
_COLUMNS = ("replica", "state", "busy", "blocks", "local", "peers", "computed", "hit", "MiB", "ms", "lost")
_LEGEND = (
    "tokens from the replica's own cache, from peers, computed; MiB imported, ms per import; "
    "lost: imports that failed and were computed"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags to `parser`."""
    add_gateway_flags(parser)
    parser.add_argument("--once", action="store_true", help="print the table once and exit")
    parser.add_argument("--json", action="store_true", help="print /kv/stats as JSON and exit")
    parser.add_argument("--model", default="", metavar="NAME", help="one of several models (default: the first)")
    parser.add_argument(
        "--interval", type=float, default=INTERVAL_SECONDS, metavar="SECONDS", help="time between updates (default: 1)"
    )


def run(arguments: argparse.Namespace, console: Console | None = None, transport: httpx.BaseTransport | None = None) -> int:
    """Run the command and return its exit status: 1 if the figures could not be read. Raises SettingsError."""
    console = console or Console()
    with client_for(arguments, transport) as client:
        try:
            stats = read_stats(client, arguments.model)
            if arguments.json:
                console.file.write(json.dumps(stats.model_dump(), indent=2) + "\n")
            elif arguments.once or not console.is_terminal:
                console.print(render(stats, None, 0.0))
            else:
                _follow(client, console, stats, max(0.1, arguments.interval))
        except CommandFailed as error:
            print(f"peerkv: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 0
    return 0


def read_stats(client: httpx.Client, model: str = "") -> KvStats:
    """Fetch /kv/stats, of one of several models if it is named. Raises CommandFailed."""
    return read(KvStats, ask(client, "/kv/stats", query={"model": model}))


def _follow(
    client: httpx.Client,
    console: Console,
    stats: KvStats,
    interval_seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    seen = clock()
    before: KvStats | None = None
    with Live(render(stats, None, 0.0), console=console, auto_refresh=False, screen=False) as live:
        while True:
            sleep(interval_seconds)
            before, since = stats, seen
            stats, seen = read_stats(client, stats.model if len(stats.models) > 1 else ""), clock()
            live.update(render(stats, before, seen - since), refresh=True)


def render(stats: KvStats, before: KvStats | None, seconds: float) -> RenderableType:
    """Return the table; `before` is the snapshot from `seconds` ago, for rates."""
    title = f"{stats.model}, peerkv {stats.gateway.version}, up {stats.gateway.uptime_seconds:,.0f} s"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=_LEGEND)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("replica", "state") else "right", no_wrap=True)
    for replica in stats.replicas:
        table.add_row(*_replica_cells(replica))
    table.add_section()
    table.add_row(*_total_cells(stats.totals))
    return Group(table, *_notes(stats, before, seconds))


def _replica_cells(replica: ReplicaStats) -> list[str]:
    return [replica.name, replica.state, *_figures(replica)]


def _total_cells(totals: Totals) -> list[str]:
    return ["total", f"{totals.ready}/{totals.replicas}", *_figures(totals)]


def _figures(part: ReplicaStats | Totals) -> list[str]:
    tokens, counts = part.tokens, part.counts
    return [
        str(part.in_flight),
        f"{part.cached_blocks}/{part.blocks}",
        short(tokens.local),
        short(from_peers(tokens)),
        short(tokens.computed),
        f"{1 - tokens.computed / tokens.prompt:.0%}" if tokens.prompt else "-",
        short(counts.import_bytes >> 20),
        f"{counts.import_seconds / counts.imports * 1000:,.1f}" if counts.imports else "-",
        str(counts.fallbacks),
    ]


def short(count: int) -> str:
    """Write a count in at most seven characters."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:,}"


def from_peers(tokens: TokenCounts) -> int:
    """Return the tokens that came from other replicas, by whatever transport."""
    return tokens.peer_shared_memory + tokens.peer_cuda_ipc


def _losses(ledger: LedgerStats) -> list[Text]:
    """Requests and lost tokens by reason, those that occurred."""
    found = {reason: count for reason, count in ledger.requests.items() if count}
    if not found:
        return []
    lost = ledger.lost_tokens
    parts = [
        f"{reason} {count:,}" + (f" (-{short(lost[reason])})" if lost.get(reason) else "") for reason, count in found.items()
    ]
    predicted, delivered = ledger.predicted_tokens, ledger.local_tokens + ledger.peer_tokens
    return [
        Text(f"requests by the reason for their cache miss, with the tokens lost: {', '.join(parts)}"),
        Text(f"tokens from caches: {short(predicted)} expected, {short(delivered)} delivered"),
    ]


def _below(stats: KvStats) -> list[Text]:
    """A line for disk and vault each, and one for what is wrong with it."""
    notes = []
    for store in stats.tiers.stores:
        restored = short(getattr(stats.totals.tokens, store.name))
        size = f"{store.bytes / GIB:,.1f}" + (f" of {store.bytes_max / GIB:,.1f}" if store.bytes_max else "")
        notes.append(Text(f"{store.name}: {store.frames:,} blocks, {size} GiB, {restored} tokens restored"))
        if store.state != "ok":
            notes.append(Text(f"{store.name}: {store.state}", style="yellow"))
    if lost := stats.tiers.lost_blocks:
        notes.append(Text(f"{lost:,} blocks left host memory before they were written"))
    return notes


def _notes(stats: KvStats, before: KvStats | None, seconds: float) -> list[Text]:
    notes = []
    if before is not None and seconds > 0:
        prompts = (stats.totals.tokens.prompt - before.totals.tokens.prompt) / seconds
        peers = (from_peers(stats.totals.tokens) - from_peers(before.totals.tokens)) / seconds
        notes.append(Text(f"now: {prompts:,.0f} prompt tokens/s, {peers:,.0f} of them from peers"))
    for kind, parity in (("completions", stats.parity.completions), ("chat", stats.parity.chat)):
        if parity.parity != "exact":
            notes.append(Text(f"token ids of {kind}: {parity.parity} {parity.reason}".rstrip(), style="yellow"))
    notes += _losses(stats.ledger)
    if others := [model for model in stats.models if model != stats.model]:
        notes.append(Text(f"other models (--model): {', '.join(others)}"))
    if stats.host_memory:
        stored, slots = (sum(getattr(tier, name) for tier in stats.host_memory) for name in ("stored_blocks", "blocks"))
        restored = short(stats.totals.tokens.host_memory)
        notes.append(Text(f"host memory: {stored:,} of {slots:,} blocks used, {restored} tokens restored"))
    notes += _below(stats)
    for replica in stats.replicas:
        if replica.state != "ready" and replica.reason:
            why = "" if replica.reason == replica.state else f": {replica.reason}"
            notes.append(Text(f"{replica.name} {ReplicaState(replica.state).in_words}{why}", style="yellow"))
        for other, fields in replica.incompatible.items():
            notes.append(Text(f"{replica.name} does not import from {other}: {'; '.join(fields)}", style="yellow"))
    return notes
