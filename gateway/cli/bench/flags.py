"""The flags of `peerkv bench`."""

import argparse
from pathlib import Path

from gateway.cli.trust import CACERT_HELP

SECTIONS = ("first-token", "overhead", "throughput")
SAMPLES = 5
FIRST_TOKEN_SECONDS_MAX = 60.0
THROUGHPUT_SECONDS = 20.0
PAIRS = 40
PREFIXES = 8
ANSWER_TOKENS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags to `parser`."""
    parser.add_argument("--url", metavar="URL", help="URL of the gateway (default: from the host and port in the settings)")
    parser.add_argument("--port", metavar="N", help="its port on this machine (default: from the settings)")
    parser.add_argument(
        "--start",
        nargs="?",
        const="",
        metavar="MODEL",
        help="start replicas and a gateway just for this, with MODEL or the default one",
    )
    parser.add_argument("--api-key", default="", metavar="KEY", help="a tenant's key, if the gateway requires one")
    parser.add_argument("--admin-key", metavar="KEY", help="the admin key, if the gateway has one (default: from the settings)")
    parser.add_argument("--cacert", type=Path, metavar="FILE", help=CACERT_HELP)
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML (default: $PEERKV_CONFIG)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run (default: all)")
    text = f"prompt lengths in tokens (default: three that fit into the context and into {FIRST_TOKEN_SECONDS_MAX:g} s)"
    parser.add_argument("--lengths", type=_count, nargs="+", metavar="N", help=text)
    parser.add_argument(
        "--samples", type=_count, default=SAMPLES, metavar="N", help=f"samples of each length (default: {SAMPLES})"
    )
    parser.add_argument(
        "--pairs",
        type=_count,
        default=PAIRS,
        metavar="N",
        help=f"small requests with and without the gateway (default: {PAIRS})",
    )
    parser.add_argument(
        "--rate", type=_positive, metavar="N", help="requests per second of the throughput run (default: a modest rate)"
    )
    text = f"duration of the throughput run (default: {THROUGHPUT_SECONDS:g})"
    parser.add_argument("--seconds", type=_positive, default=THROUGHPUT_SECONDS, metavar="SECONDS", help=text)
    parser.add_argument(
        "--prefixes", type=_count, default=PREFIXES, metavar="N", help=f"prefixes that its requests share (default: {PREFIXES})"
    )
    parser.add_argument(
        "--prefix-tokens", type=_count, metavar="N", help="length of these prefixes (default: the middle prompt length)"
    )
    text = f"length of its answers (default: {ANSWER_TOKENS})"
    parser.add_argument("--answer-tokens", type=_count, default=ANSWER_TOKENS, metavar="N", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results, including every sample, to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the times to the first token to FILE, as SVG")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be more than 0")
    return value
