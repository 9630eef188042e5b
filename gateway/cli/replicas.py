"""`peerkv replicas list|drain|resume|restart`: what the replicas do, changed without a failed request."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any
from urllib.parse import quote

import httpx
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gateway.cli.asking import CommandFailed, add_command, ask, read
from gateway.replica_control.shapes import ControlledReplica, ReplicaList, Step

POLL_SECONDS = 0.5
IN_FLAGS = {"; force it,": "; give --force,"}
WAIT_SECONDS = 1800.0
"""For one replica: large models take long to load."""
SUMMARY = "list, drain, resume and restart the replicas of a running gateway"


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `replicas` and its commands to those of `peerkv`."""
    parser = commands.add_parser("replicas", help=SUMMARY, description=SUMMARY)
    views = parser.add_subparsers(metavar="COMMAND", required=True)
    add_command(views, "list", _list, "list the replicas, and what is being done with them")
    drain = add_command(
        views, "drain", _drain, "send a replica no new requests, and put its most requested prefixes into the caches of others"
    )
    drain.add_argument("name", metavar="NAME", help="of the replica, for example replica-0")
    drain.add_argument(
        "--force", action="store_true", help="drain it even if no other replica is ready, so that nobody serves (default: no)"
    )
    resume = add_command(views, "resume", _resume, "send a drained replica, or all of this node, requests again")
    whom = resume.add_mutually_exclusive_group(required=True)
    whom.add_argument("name", nargs="?", metavar="NAME", help="of the replica, for example replica-0")
    whom.add_argument("--all", action="store_true", help="every replica of this node that is drained")
    text = "drain a replica, hand over its prefixes, wait for its requests (--drain-seconds of the gateway) and restart it"
    restart = add_command(views, "restart", _restart, f"{text}; or all of this node, one after the other")
    which = restart.add_mutually_exclusive_group(required=True)
    which.add_argument("name", nargs="?", metavar="NAME", help="of the replica, for example replica-0")
    which.add_argument("--all", action="store_true", help="every replica of this node, each when the one before is ready again")
    restart.add_argument(
        "--force", action="store_true", help="restart it even if no other replica is ready, so that nobody serves (default: no)"
    )
    restart.add_argument(
        "--wait-seconds",
        type=float,
        default=WAIT_SECONDS,
        metavar="SECONDS",
        help=f"how long to wait for each until it is ready again (default: {WAIT_SECONDS:g})",
    )


def _list(arguments: argparse.Namespace, client: httpx.Client, console: Console) -> int:
    answer = ask(client, "/replicas")
    found = read(ReplicaList, answer)
    if arguments.json:
        console.file.write(json.dumps(json.loads(answer), indent=2) + "\n")
        return 0
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("replica", "state", "requests", "restarts", "device", "note"):
        table.add_column(column, justify="right" if column in ("requests", "restarts") else "left")
    for each in found.replicas:
        note = each.step.value or each.failure or ("" if each.reason == each.state else each.reason)
        note = "; ".join(part for part in (f"of {each.node}, which alone changes it" if each.node else "", note) if part)
        table.add_row(each.name, each.state, str(each.requests), str(each.restarts), each.device, note)
    console.print(table)
    if not found.restartable:
        console.print("`peerkv engine` runs them: this gateway can drain and resume them, their operator restarts them")
    return 0


def _drain(arguments: argparse.Namespace, client: httpx.Client, console: Console) -> int:
    done = _post(client, arguments.name, "drain", _force(arguments))
    while not arguments.json and done.step is Step.HANDING_OVER:
        time.sleep(POLL_SECONDS)
        done = _now(client, arguments.name)
    words = f"{done.name} is {done.state}; {done.handed_over_tokens} tokens of its prefixes were handed over"
    return _tell(arguments, console, done, words)


def _resume(arguments: argparse.Namespace, client: httpx.Client, console: Console) -> int:
    names = [arguments.name]
    if arguments.all:
        found = read(ReplicaList, ask(client, "/replicas")).replicas
        names = [each.name for each in found if not each.node and each.state == "draining" and each.step is not Step.RESTARTING]
        if not names and not arguments.json:
            console.print("no replica of this node is drained")
    for name in names:
        done = _post(client, name, "resume")
        _tell(arguments, console, done, f"{done.name} is {done.state}")
    return 0


def _restart(arguments: argparse.Namespace, client: httpx.Client, console: Console) -> int:
    names = [arguments.name]
    if arguments.all:
        found = read(ReplicaList, ask(client, "/replicas")).replicas
        names = [replica.name for replica in found if not replica.node]
        others = [replica.name for replica in found if replica.node]
        if others and not arguments.json:
            console.print(f"the replicas of this node alone: {', '.join(others)} are for a gateway of their node to restart")
    for name in names:
        began, step = time.monotonic(), None
        now = _post(client, name, "restart", _force(arguments))
        while now.step is not Step.NONE:
            if now.step is not step and not arguments.json:
                console.print(f"{name}: {now.step.value}")
            step = now.step
            if time.monotonic() - began > arguments.wait_seconds:
                raise CommandFailed(
                    f"{name} was not ready again in {arguments.wait_seconds:g} s; `peerkv replicas list` tells more"
                )
            time.sleep(POLL_SECONDS)
            now = _now(client, name)
        if now.failure:
            raise CommandFailed(f"{name} was not restarted: {now.failure}")
        words = f"{name}: ready again after {time.monotonic() - began:.1f} s; {now.handed_over_tokens} tokens were handed over"
        _tell(arguments, console, now, words)
    return 0


def _force(arguments: argparse.Namespace) -> dict[str, str]:
    return {"force": "true"} if arguments.force else {}


def _post(client: httpx.Client, name: str, what: str, query: dict[str, str] | None = None) -> ControlledReplica:
    path = f"/replicas/{quote(name, safe='')}/{what}"
    return read(ControlledReplica, ask(client, path, query=query, method="POST", in_flags=IN_FLAGS))


def _now(client: httpx.Client, name: str) -> ControlledReplica:
    for replica in read(ReplicaList, ask(client, "/replicas")).replicas:
        if replica.name == name:
            return replica
    raise CommandFailed(f"there is no replica '{name}' any more")


def _tell(arguments: argparse.Namespace, console: Console, done: ControlledReplica, words: str) -> int:
    if arguments.json:
        console.file.write(json.dumps(done.model_dump(mode="json"), indent=2) + "\n")
    else:
        console.print(words)
    return 0
