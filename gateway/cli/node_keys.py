"""`peerkv node-keys`: the keys by which nodes know each other."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.node.settings import check_name
from transport.node.keys import make_keys
from transport.node.messages import NodeError

_ABOUT = """Make an authority in DIRECTORY, unless one is there, and a directory in it for each NODE, with the certificate of
the node, its key and the authority's certificate. Bring each to its node, and name it with --node-keys. ca-key.pem stays
here: who has it makes keys for further nodes."""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `node-keys`."""
    parser = commands.add_parser(
        "node-keys",
        help="make the keys by which nodes know each other",
        description=_ABOUT,
        allow_abbrev=False,
    )
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="where the authority is, or will be")
    parser.add_argument("nodes", nargs="+", metavar="NODE", help="a node's name, as its --node-name says it")
    parser.set_defaults(run=_run, parser=parser)


def _run(given: argparse.Namespace) -> int:
    try:
        for node in given.nodes:
            check_name(node)
        for made in make_keys(given.directory, given.nodes):
            print(f"{made.name}: --node-keys {made}")
    except (NodeError, OSError) as error:
        print(f"peerkv: {error}", file=sys.stderr)
        return 1
    return 0
