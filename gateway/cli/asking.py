"""Commands that ask a running gateway: their flags, their client, and how they end."""

from __future__ import annotations

import argparse
import json
import ssl
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import httpx
from pydantic import TypeAdapter, ValidationError
from rich.console import Console, RenderableType

from gateway.cli.trust import CACERT_HELP, tls_trouble, trust
from gateway.settings import address, load
from gateway.tenants.loopback import is_loopback_url

ANSWER_SECONDS_MAX = 10.0
AnswerT = TypeVar("AnswerT")
Work = Callable[[argparse.Namespace, httpx.Client, Console], int]


class CommandFailed(Exception):
    """What a command was to do was not done; the message says why, and what to do."""


def add_command(views: argparse._SubParsersAction[Any], name: str, work: Work, summary: str) -> argparse.ArgumentParser:
    """Add a command that `run` runs by `work`, which prints and returns the exit status, and raises CommandFailed."""
    parser: argparse.ArgumentParser = views.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    add_gateway_flags(parser)
    parser.add_argument("--json", action="store_true", help="print the gateway's answers as JSON (default: in words)")
    parser.set_defaults(run=run, work=work, parser=parser)
    return parser


def add_gateway_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which gateway is meant, as `client_for` reads them."""
    parser.add_argument(
        "--url", default=None, metavar="URL", help="URL of the gateway (default: from the host and port in the settings)"
    )
    parser.add_argument("--port", default=None, metavar="N", help="its port on this machine (default: from the settings)")
    parser.add_argument("--admin-key", default=None, metavar="KEY", help="the admin key (default: from the settings)")
    parser.add_argument("--cacert", type=Path, metavar="FILE", help=CACERT_HELP)
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML (default: $PEERKV_CONFIG)")


def run(arguments: argparse.Namespace, console: Console | None = None, transport: httpx.BaseTransport | None = None) -> int:
    """Run a command of `add_command`; return its exit status, 1 when it was not done. Raises SettingsError."""
    console = console or Console()
    with client_for(arguments, transport) as client:
        try:
            status: int = arguments.work(arguments, client, console)
        except CommandFailed as error:
            print(f"peerkv: {error}", file=sys.stderr)
            return 1
    return status


def client_for(arguments: argparse.Namespace, transport: httpx.BaseTransport | None) -> httpx.Client:
    """Return a client for the gateway that the flags or the settings name. Raises SettingsError."""
    settings = load({"port": arguments.port}, arguments.config)
    key = arguments.admin_key or (settings.admin_key.get_secret_value() if settings.admin_key else "")
    url = arguments.url or address(settings)
    return client_at(url, key, trust(url, arguments.cacert, settings.tls_cert), transport)


def client_at(url: str, key: str, verify: ssl.SSLContext | bool, transport: httpx.BaseTransport | None = None) -> httpx.Client:
    """Return a client for the gateway at `url`, with the admin key if there is one; `verify` is what `trust` returns."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    by_proxy = not is_loopback_url(url)  # which could not reach the gateway, and would get the admin key
    return httpx.Client(
        base_url=url, headers=headers, timeout=ANSWER_SECONDS_MAX, transport=transport, trust_env=by_proxy, verify=verify
    )


def ask(
    client: httpx.Client,
    path: str,
    *,
    query: Mapping[str, object] | None = None,
    missing: str = "",
    method: str = "GET",
    body: object = None,
    also: Collection[int] = (),
    in_flags: Mapping[str, str] | None = None,
    seconds_max: float = ANSWER_SECONDS_MAX,
) -> bytes:
    """Return the body of the gateway's answer, 2xx or a status in `also`; `missing` says what a 404 means.

    Of the `query`, what is "" is left out. `in_flags` has the command's words for some of the gateway's,
    whose message is then all that is told.
    Raises CommandFailed.
    """
    asked = urlencode({name: value for name, value in (query or {}).items() if value != ""})
    path = f"{path}?{asked}" if asked else path
    try:
        answer = client.request(method, path, json=body, timeout=seconds_max)
    except httpx.HTTPError as error:
        broke_off = isinstance(error, (httpx.RemoteProtocolError, httpx.ReadError))
        if trouble := tls_trouble(str(client.base_url).rstrip("/"), error, broke_off=broke_off):
            raise CommandFailed(trouble) from error
        why = f"no gateway is answering at {client.base_url}: {error}"
        raise CommandFailed(f"{why}; start one by `peerkv serve`, or name its --port") from error
    if answer.status_code in (401, 403):
        if "authorization" in client.headers:
            raise CommandFailed("the gateway refuses this admin key")
        raise CommandFailed("the gateway requires the admin key: pass --admin-key or set PEERKV_ADMIN_KEY")
    if answer.status_code == 404 and missing:
        raise CommandFailed(missing)
    if not answer.is_success and answer.status_code not in also:
        why = _message(answer)
        for words, ours in (in_flags or {}).items():
            if words in why:
                raise CommandFailed(why.replace(words, ours))
        raise CommandFailed(f"the gateway answered {answer.status_code} to {client.base_url}{path}{f': {why}' if why else ''}")
    return answer.content


def _message(answer: httpx.Response) -> str:
    """What an answer in OpenAI's error form says, "" for any other."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def read(shape: type[AnswerT], answer: bytes) -> AnswerT:
    """The gateway's answer as its shape. Raises CommandFailed."""
    try:
        return TypeAdapter(shape).validate_json(answer)
    except ValidationError as error:
        why = f"the answer is not from a peerkv of this version: {error.error_count()} fields do not fit"
        raise CommandFailed(why) from error


def show(arguments: argparse.Namespace, console: Console, answer: bytes, words: RenderableType) -> None:
    """Print an answer: as it is with --json, else `words`."""
    if arguments.json:
        console.file.write(json.dumps(json.loads(answer), indent=2) + "\n")
    else:
        console.print(words)
