"""`peerkv keys add|list|revoke|rotate`: the keys file, changed while gateways use it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gateway.cli.spans import SPANS, span_of
from gateway.errors import SettingsError
from gateway.settings import load
from gateway.tenants.key_file import KeyFileError, locked, read_keys, write_keys
from gateway.tenants.keys import CLASSES, Key, KeyLimits, Keys, digest_of, new_token

GRACE_DEFAULT = "1h"
_FREE = "a revoked or expired key gives way to a new one of its name"

Work = Callable[[argparse.Namespace, Path, datetime], int]


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `keys` and its commands."""
    summary = "add, list, revoke and rotate API keys, and limit what they may use"
    parser = commands.add_parser("keys", help=summary, description=summary)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    add = _add(verbs, "add", _add_key, "make a key, and show it once")
    add.add_argument("name", metavar="NAME", help=f"what the key is called, in this file and in figures; {_FREE}")
    add.add_argument(
        "--tenant", metavar="NAME", help="whose it is; the keys of a tenant share one prefix cache (default: NAME)"
    )
    text = "a group whose tenants share one prefix cache, and can tell by the time what others sent (default: none)"
    add.add_argument("--group", metavar="NAME", help=text)
    add.add_argument(
        "--model", action="append", default=[], metavar="NAME", help="a model that it may name; repeat for more (default: all)"
    )
    text = "its requests' class where they wait for their turn (default: normal)"
    add.add_argument("--priority", choices=CLASSES, default="normal", help=text)
    text = "its requests may be served with KV that was kept with loss, where the server has --lossy (default: exact KV alone)"
    add.add_argument("--accepts-loss", action="store_true", help=text)
    add.add_argument("--expires", metavar="WHEN", help=f"a span, {SPANS}, or a date (default: never)")
    for name, field in KeyLimits.model_fields.items():
        flag = "--" + name.replace("_", "-")
        add.add_argument(flag, type=int, metavar="N", help=f"{field.description} (default: no limit)")
    _add(verbs, "list", _list, "show the keys and their limits")
    revoke = _add(verbs, "revoke", _revoke, "end a key for good")
    revoke.add_argument("name", metavar="NAME", help="as `keys list` shows it")
    rotate = _add(verbs, "rotate", _rotate, "replace a key with a new one that has the same limits")
    rotate.add_argument("name", metavar="NAME", help="as `keys list` shows it")
    text = f"how long the old key works too, {SPANS}; 0s ends it at once (default: {GRACE_DEFAULT})"
    rotate.add_argument("--grace", default=GRACE_DEFAULT, metavar="SPAN", help=text)


def _add(verbs: Any, name: str, work: Work, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.add_argument("--keys-file", metavar="FILE", help="the file (default: the setting keys_file, PEERKV_KEYS_FILE)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML (default: $PEERKV_CONFIG)")
    parser.add_argument("--json", action="store_true", help="print JSON (default: text)")
    parser.set_defaults(run=run, work=work, parser=parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run one of the commands; returns its exit status. Raises SettingsError, KeyFileError."""
    path = load({"keys_file": arguments.keys_file}, arguments.config).keys_file
    if path is None:
        raise SettingsError("which keys file? Name it by --keys-file FILE, PEERKV_KEYS_FILE or keys_file in the settings")
    work: Work = arguments.work
    return work(arguments, path, datetime.now(UTC).replace(microsecond=0))


def _add_key(arguments: argparse.Namespace, path: Path, now: datetime) -> int:
    token = new_token()
    given = {name: getattr(arguments, name) for name in KeyLimits.model_fields}
    with locked(path) as keys:
        former = keys.named(arguments.name)
        if former is not None and former.state(now) == "active":
            raise KeyFileError(f"there is a key '{arguments.name}' already; `peerkv keys rotate` replaces it")
        tenant = arguments.tenant or arguments.name
        others = keys.model_copy(update={"keys": tuple(key for key in keys.keys if key.name != arguments.name)})
        key = _checked(
            name=arguments.name,
            tenant=tenant,
            group=arguments.group or others.group_of(tenant),
            sha256=_hex(token),
            created=now,
            expires=_moment(arguments.expires, now),
            models=tuple(arguments.model),
            priority=arguments.priority,
            accepts_loss=arguments.accepts_loss,
            **given,
        )
        if any(each.tenant == tenant and each.group != key.group for each in others.keys):
            raise KeyFileError(f"the tenant '{tenant}' has keys of {_group_in_words(others.group_of(tenant))}, and one cache")
        write_keys(path, keys.with_key(key))
    instead = f"it takes the place of one that was {former.state(now)}; " if former is not None else ""
    _show_once(arguments, key, token, f"{instead}the key is shown this once; only its digest is kept")
    return 0


def _revoke(arguments: argparse.Namespace, path: Path, now: datetime) -> int:
    with locked(path) as keys:
        key = _named(keys, arguments.name)
        ended = key.model_copy(update={"revoked": key.revoked or now})
        write_keys(path, keys.with_key(ended))
    print(json.dumps(_shown(ended, now), indent=2) if arguments.json else f"{key.name} is revoked")
    return 0


def _rotate(arguments: argparse.Namespace, path: Path, now: datetime) -> int:
    token, grace = new_token(), span_of(arguments.grace)
    if grace is None:
        raise SettingsError(f"--grace: '{arguments.grace}' is no span of time, {SPANS}")
    with locked(path) as keys:
        key = _named(keys, arguments.name)
        if key.state(now) != "active":
            instead = f"`peerkv keys add {key.name}` makes a new one in its place"
            raise KeyFileError(f"the key '{key.name}' is {key.state(now)}; {instead}")
        former = {"former_sha256": key.sha256, "former_expires": now + grace} if grace else dict.fromkeys(_FORMER)
        fresh = key.model_copy(update={"sha256": _hex(token), "created": now, **former})
        write_keys(path, keys.with_key(fresh))
    ends = f"the old key works until {(now + grace).isoformat()}" if grace else "the old key works no longer"
    _show_once(arguments, fresh, token, f"{ends}; the new one is shown this once")
    return 0


def _group_in_words(group: str | None) -> str:
    return "no group" if group is None else f"the group '{group}'"


_FORMER = ("former_sha256", "former_expires")


def _list(arguments: argparse.Namespace, path: Path, now: datetime) -> int:
    keys = read_keys(path).keys
    if arguments.json:
        print(json.dumps([_shown(key, now) for key in keys], indent=2))
        return 0
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("name", "tenant", "state", "expires", "models", "limits"):
        table.add_column(column, overflow="fold")
    for key in keys:
        limits = [f"{name}={value:,}" for name in KeyLimits.model_fields if (value := getattr(key, name)) is not None]
        limits += [f"priority={key.priority}"] * (key.priority != "normal")
        limits += ["accepts loss"] * key.accepts_loss
        limits += [f"group={key.group}"] * (key.group is not None)
        ends = key.expires.date().isoformat() if key.expires else "never"
        table.add_row(key.name, key.tenant, key.state(now), ends, " ".join(key.models) or "all", " ".join(limits) or "none")
    Console().print(table if keys else "there are no keys yet; `peerkv keys add NAME` makes one")
    return 0


def _show_once(arguments: argparse.Namespace, key: Key, token: str, words: str) -> None:
    if arguments.json:
        print(json.dumps({**_shown(key, datetime.now(UTC)), "key": token}, indent=2))
        return
    Console(stderr=True, soft_wrap=True).print(f"{key.name} of tenant {key.tenant}: {words}", highlight=False)
    print(token)


def _shown(key: Key, now: datetime) -> dict[str, Any]:
    """What is told of a key: no digests."""
    told = key.model_dump(mode="json", exclude={"sha256", "former_sha256"}, exclude_none=True)
    return {**told, "state": key.state(now)}


def _named(keys: Keys, name: str) -> Key:
    key = keys.named(name)
    if key is None:
        known: Sequence[str] = [each.name for each in keys.keys]
        raise KeyFileError(f"there is no key '{name}'; there are: {', '.join(known) or 'none'}")
    return key


def _hex(token: str) -> str:
    return digest_of(token.encode()).hex()


def _checked(**values: Any) -> Key:
    try:
        return Key(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"])).replace("_", "-")
        raise SettingsError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from None


def _moment(text: str | None, now: datetime) -> datetime | None:
    """When a key expires. Raises SettingsError."""
    if text is None:
        return None
    try:
        span = span_of(text)
        moment = datetime.fromisoformat(text) if span is None else now + span
    except (ValueError, OverflowError):
        raise SettingsError(f"--expires: '{text}' is neither a span, {SPANS}, nor a date such as 2027-01-31") from None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    if moment <= now:
        raise SettingsError(f"--expires: {text} is over already")
    return moment
