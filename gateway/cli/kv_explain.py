"""`peerkv kv explain ID`: what a running gateway decided for a request, what was delivered, and why not more."""

import argparse
import json
import sys
from urllib.parse import quote

import httpx
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gateway.cli.asking import CommandFailed, add_gateway_flags, ask, client_for, read
from gateway.ledger import ledger
from gateway.ledger.misses import MissReason
from gateway.stats.explain import Attempt, Delivered, Explanation, OptionConsidered, Promoted
from gateway.stats.shapes import GroupStats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags to `parser`."""
    parser.add_argument(
        "request_id", metavar="ID", help="the x-request-id of the answer, or the id in its body (cmpl-…, not resp_…)"
    )
    add_gateway_flags(parser)
    parser.add_argument("--json", action="store_true", help="print /kv/explain as JSON")


def run(arguments: argparse.Namespace, console: Console | None = None, transport: httpx.BaseTransport | None = None) -> int:
    """Run the command and return its exit status: 1 if nothing could be read. Raises SettingsError."""
    console = console or Console()
    with client_for(arguments, transport) as client:
        try:
            found = read_explanation(client, arguments.request_id)
        except CommandFailed as error:
            print(f"peerkv: {error}", file=sys.stderr)
            return 1
    if arguments.json:
        console.file.write(json.dumps(found.model_dump(), indent=2) + "\n")
    else:
        for attempt in found.attempts:
            console.print(render(attempt))
    return 0


def read_explanation(client: httpx.Client, request_id: str) -> Explanation:
    """Fetch /kv/explain. Raises CommandFailed."""
    missing = f"the ledger knows no request '{request_id}'"
    return read(Explanation, ask(client, f"/kv/explain/{quote(request_id, safe='')}", missing=missing))


def render(attempt: Attempt) -> RenderableType:
    """Return what people want to know of an attempt."""
    expected = attempt.expected
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("", "local", "peer", "computed", "first token s", "import s"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    figures = (expected.local_tokens, expected.peer_tokens, expected.computed_tokens)
    table.add_row("expected", *map(str, figures), f"{expected.first_token_seconds:.3f}", f"{expected.transfer_seconds:.3f}")
    for delivered in attempt.delivered:
        table.add_row("delivered", *_delivered_cells(delivered))
    where = f"{attempt.replica}, importing from {attempt.source}" if attempt.source else attempt.replica
    tokens = f"{attempt.prompt_tokens or 'unknown'} prompt tokens"
    head = f"{attempt.endpoint} of tenant {attempt.tenant}: {tokens}, {_outcome(attempt)}"
    lines = [
        Text(head, style="bold"),
        Text(f"{attempt.action} on {where}: {'the caller chose the replica; ' if attempt.pinned else ''}{attempt.why}"),
        Text(f"longest prefix that any replica held: {expected.best_available_tokens} tokens"),
    ]
    if attempt.promoted is not None:
        lines.append(Text(f"disk and vault, {attempt.promoted.seconds:.3f} s: {_brought(attempt.promoted)}"))
    if attempt.options:
        lines.append(Text("considered: " + "; ".join(map(_considered, attempt.options))))
    if any(group.kind != "full" for group in attempt.groups):
        lines.append(Text("an import brings: " + "; ".join(map(_brings, attempt.groups))))
    for delivered in attempt.delivered:
        if len(delivered.sources) > 1:
            came = (f"{each.tokens} tokens from {each.source}" for each in delivered.sources)
            lines.append(Text("imported, in the order of the prompt: " + ", ".join(came)))
    lost = f", {attempt.lost_tokens} tokens lost" if attempt.lost_tokens else ""
    return Group(*lines, table, Text(_loss(attempt) + lost + ("" if attempt.settled else " (not final)")))


def _brought(promoted: Promoted) -> str:
    """What disk and vault did for a request."""
    return f"{promoted.tokens} tokens are up from {promoted.source}" if promoted.source else promoted.why


def _brings(group: GroupStats) -> str:
    """What a KV cache group adds to an import."""
    window = f" of {group.window} tokens" if group.window else ""
    kind = "full attention" if group.kind == "full" else group.kind
    cost = f"{group.token_bytes:,.0f} bytes a token" if group.token_bytes else f"{group.import_bytes:,.0f} bytes"
    return f"{cost} for {group.layers} layers of {kind}{window}"


def _outcome(attempt: Attempt) -> str:
    """The end of an attempt in words."""
    match attempt.status:
        case None:
            return "still running"
        case ledger.LOST_STATUS:
            return f"no answer: {attempt.replica} died or broke off"
        case ledger.LEFT_STATUS:
            return "the client left"
        case status:
            return f"status {status}"


def _loss(attempt: Attempt) -> str:
    if attempt.reason == MissReason.NONE:
        return "nothing was lost: it got all that any replica had"
    return f"{attempt.reason}: {attempt.reason_in_words}" if attempt.reason_in_words else attempt.reason


def _considered(option: OptionConsidered) -> str:
    source = f" from {option.source}" if option.source else ""
    return f"{option.action} on {option.replica}{source} {option.seconds:.3f} s"


def _delivered_cells(delivered: Delivered) -> list[str]:
    tokens = (delivered.local_tokens, delivered.peer_tokens, delivered.computed_tokens)
    return [*map(str, tokens), _or_dash(delivered.first_token_seconds), f"{delivered.import_seconds:.3f}"]


def _or_dash(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
