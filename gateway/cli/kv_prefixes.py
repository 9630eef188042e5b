"""`peerkv kv prefixes`, `kv pin`, `kv unpin` and `kv flush`: what the caches hold, and what they are to keep."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gateway.cli.asking import CommandFailed, add_command, ask, read, show
from gateway.cli.spans import SPANS, span_of
from gateway.kept_prefixes.book import KeptPrefixAnswer, PlaceState, PrefixPlace
from gateway.kept_prefixes.shapes import TTL_SECONDS_DEFAULT, FlushedPrefixes, PrefixRemoved, PrefixReport

PREFIXES_SHOWN = 20
IN_FLAGS = {"'tenant' is missing": "--tenant is missing"}
PIN_TIMEOUT_SECONDS = 600.0
"""A long prefix is computed on each of its replicas before the gateway answers; see prefix_seconds_max."""
_KEY_DIGITS_SHOWN = 8
_PINS_TOO = "pinned prefixes go too, and only those pinned with --renew are computed and pinned again"


def add_views(views: "argparse._SubParsersAction[Any]") -> None:
    """Add the commands to those of `peerkv kv`."""
    prefixes = add_command(
        views, "prefixes", _prefixes, "show the most requested prefixes, the replicas that hold them, and those kept on request"
    )
    prefixes.add_argument(
        "--limit", type=int, default=PREFIXES_SHOWN, metavar="N", help=f"prefixes to show (default: {PREFIXES_SHOWN})"
    )
    prefixes.add_argument("--model", default="", metavar="NAME", help="one of several models (default: the first)")
    pin = add_command(views, "pin", _pin, "keep a prefix in the caches of one or more replicas")
    what = pin.add_mutually_exclusive_group(required=True)
    what.add_argument("text", nargs="?", metavar="TEXT", help="the beginning of completions' prompts")
    what.add_argument("--file", type=Path, metavar="FILE", help="read TEXT from a file; -: from standard input")
    what.add_argument(
        "--messages", type=Path, metavar="FILE", help="the first messages of chats, as JSON; -: from standard input"
    )
    pin.add_argument("--replicas", type=int, metavar="N", help="number of replicas that should hold it (default: 1)")
    text = f"how long to keep it, in seconds or {SPANS} (default: {TTL_SECONDS_DEFAULT:g})"
    pin.add_argument("--ttl", type=_seconds, metavar="SPAN", help=text)
    pin.add_argument("--renew", action="store_true", help="renew it before its time is up, until it is unpinned (default: no)")
    pin.add_argument(
        "--no-pin", action="store_true", help="only put it into the caches, where it may be evicted (default: pin it)"
    )
    pin.add_argument(
        "--tenant",
        metavar="NAME",
        help="name of the tenant whose cache keeps it; required if tenants are configured (default: none)",
    )
    pin.add_argument("--model", metavar="NAME", help="one of several models, or a LoRA adapter (default: the first)")
    unpin = add_command(views, "unpin", _unpin, "stop keeping a prefix")
    unpin.add_argument("id", metavar="ID", help="as `kv pin` and `kv prefixes` show it")
    add_command(views, "flush", _flush, f"empty the prefix caches of all ready replicas, disk and vault; {_PINS_TOO}")


def _prefixes(arguments: argparse.Namespace, client: httpx.Client, console: Console) -> int:
    answer = ask(client, "/kv/prefixes", query={"limit": arguments.limit, "model": arguments.model})
    report = read(PrefixReport, answer)
    show(arguments, console, answer, render(report, time.time()))
    return 0


def _pin(arguments: argparse.Namespace, client: httpx.Client, console: Console) -> int:
    wanted = _wanted(arguments)
    answer = ask(client, "/kv/prefixes", method="POST", body=wanted, in_flags=IN_FLAGS, seconds_max=PIN_TIMEOUT_SECONDS)
    kept = read(KeptPrefixAnswer, answer)
    places = "; ".join(map(_place, kept.places))
    show(
        arguments, console, answer, Text(f"{kept.id}: {kept.whole_tokens} of {kept.tokens} tokens for {kept.ttl:g} s: {places}")
    )
    return 1 if kept.pin and not any(place.state is PlaceState.PINNED for place in kept.places) else 0


def _seconds(text: str) -> float:
    """Raises argparse.ArgumentTypeError."""
    span = span_of(text)
    try:
        return float(text) if span is None else span.total_seconds()
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of seconds nor a span, {SPANS}") from None


def _wanted(arguments: argparse.Namespace) -> dict[str, Any]:
    """The body of POST /kv/prefixes. Raises CommandFailed."""
    if arguments.messages is not None:
        try:
            wanted: dict[str, Any] = {"messages": json.loads(_content(arguments.messages))}
        except ValueError as error:
            raise CommandFailed(f"{arguments.messages} is not JSON: {error}") from None
    else:
        wanted = {"text": arguments.text if arguments.file is None else _content(arguments.file)}
    given = {name: getattr(arguments, name) for name in ("replicas", "ttl", "tenant", "model")}
    wanted |= {name: value for name, value in given.items() if value is not None}
    return wanted | {"pin": not arguments.no_pin, "renew": arguments.renew}


def _content(path: Path) -> str:
    """Raises CommandFailed."""
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandFailed(f"cannot read {path}: {error}") from None


def _unpin(arguments: argparse.Namespace, client: httpx.Client, console: Console) -> int:
    missing = f"no prefix '{arguments.id}' is kept (any more)"
    answer = ask(client, f"/kv/prefixes/{quote(arguments.id, safe='')}", method="DELETE", missing=missing)
    removed = read(PrefixRemoved, answer)
    lines = [f"{removed.id} is no longer kept; unpinned on {', '.join(removed.unpinned) or 'no replica'}"]
    lines += [f"{name} could not be told, so its pin ends when its time is up: {why}" for name, why in removed.failed.items()]
    show(arguments, console, answer, Group(*map(Text, lines)))
    return 0


def _flush(arguments: argparse.Namespace, client: httpx.Client, console: Console) -> int:
    answer = ask(client, "/kv/flush", method="POST", also=(502,))
    try:
        outcome = json.loads(answer)
        flushed, failed = outcome["flushed"], outcome["failed"]
        lost, disks = FlushedPrefixes.model_validate(outcome.get("prefixes", {})), list(map(str, outcome.get("disks_left", [])))
    except (ValueError, KeyError, TypeError) as error:
        raise CommandFailed("the answer is not from a peerkv of this version") from error
    lines = [f"emptied: {', '.join(flushed) or 'none'}", *(f"{name} was not emptied: {why}" for name, why in failed.items())]
    if lost.kept:
        gone = lost.kept - lost.renewed
        lines.append(f"kept prefixes that were there: {lost.kept}; put back, as they are renewed: {lost.renewed}; gone: {gone}")
    lines += [f"a disk of {node} is emptied by `peerkv kv flush` there" for node in disks]
    show(arguments, console, answer, Group(*map(Text, lines)))
    return 1 if failed else 0


def render(report: PrefixReport, now: float) -> RenderableType:
    """Return both tables; `now` is Unix time in seconds."""
    table = Table(title="most requested", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("key", "tokens", "requests", "last s ago", "held by"):
        table.add_column(column, justify="right" if column in ("tokens", "requests", "last s ago") else "left")
    for each in report.prefixes:
        held = ", ".join(each.holders) or "nobody"
        table.add_row(
            each.key[:_KEY_DIGITS_SHOWN], f"{each.tokens:,}", f"{each.requests:,}", f"{now - each.last_used:,.0f}", held
        )
    kept = Table(title="kept", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("id", "tenant", "tokens", "ends in s", "on"):
        kept.add_column(column, justify="right" if column in ("tokens", "ends in s") else "left")
    for one in report.kept:
        ends = "renewed" if one.renew else f"{max(0.0, one.expires - now):,.0f}"
        kept.add_row(one.id, one.tenant or "-", f"{one.tokens:,}", ends, "; ".join(map(_place, one.places)))
    shown: list[RenderableType] = [table if report.prefixes else Text("no prefix has been requested twice yet")]
    return Group(*shown, kept if report.kept else Text("none is kept; `peerkv kv pin` keeps one"))


def _place(place: PrefixPlace) -> str:
    return f"{place.replica} {place.state}" + (f" ({place.reason})" if place.reason else "")
