"""`peerkv audit verify FILE`: whether an audit log is as it was written."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gateway.admin.audit_chain import ChainBroken, verify

SUMMARY = "check the log of admins' acts that a gateway keeps with --audit-log"


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `audit` and its commands to those of `peerkv`."""
    parser = commands.add_parser("audit", help=SUMMARY, description=SUMMARY)
    views = parser.add_subparsers(metavar="COMMAND", required=True)
    summary = "check that no line was changed, taken out or put in"
    check = views.add_parser("verify", help=summary, description=summary, allow_abbrev=False)
    check.add_argument("file", type=Path, metavar="FILE", help="the log, for example audit.jsonl")
    check.add_argument(
        "--hash",
        default="",
        metavar="HEX",
        help="a hash that this command once printed: it has to be in the chain (default: none)",
    )
    check.set_defaults(run=run, parser=check)


def run(arguments: argparse.Namespace) -> int:
    """Returns 1 if the log is not as it was written."""
    try:
        chain = verify(arguments.file)
    except OSError as error:
        print(f"peerkv: cannot read {arguments.file}: {error.strerror}", file=sys.stderr)
        return 1
    except ChainBroken as error:
        print(f"peerkv: {arguments.file}: {error}", file=sys.stderr)
        return 1
    if arguments.hash and arguments.hash not in chain.hashes:
        print(f"peerkv: {arguments.file}: no line has that hash: the end was cut off, or it is another log", file=sys.stderr)
        return 1
    when = f", from {chain.since} to {chain.until}" if chain.entries else ""
    print(f"{chain.entries} entries as they were written{when}")
    print(f"last hash: {chain.last} (keep it elsewhere: --hash finds out whether the end is missing)")
    return 0
