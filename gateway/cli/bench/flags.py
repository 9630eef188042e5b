"""The flags of `peerkv bench`."""

import argparse
from pathlib import Path

SECTIONS = ("first-token", "overhead", "throughput")
SAMPLES = 5
FIRST_TOKEN_SECONDS_MAX = 60.0
THROUGHPUT_SECONDS = 20.0
PAIRS = 40
PREFIXES = 8
ANSWER_TOKENS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags to `parser`."""
    parser.add_argument("--url", help="the gateway (default: by the host and port of the settings)")
    parser.add_argument(
        "--start",
        nargs="?",
        const="",
        metavar="MODEL",
        help="start replicas and a gateway for it, with MODEL or the default one",
    )
    parser.add_argument("--api-key", default="", help="a tenant's key, where the gateway wants one")
    parser.add_argument("--admin-key", help="the admin key, where the gateway has one (default: that of the settings)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML (default: $PEERKV_CONFIG)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections (default: all)")
    text = f"prompt lengths in tokens (default: three that fit the context and {FIRST_TOKEN_SECONDS_MAX:g} s)"
    parser.add_argument("--lengths", type=_count, nargs="+", metavar="N", help=text)
    parser.add_argument("--samples", type=_count, default=SAMPLES, metavar="N", help=f"of each length (default: {SAMPLES})")
    parser.add_argument("--pairs", type=_count, default=PAIRS, metavar="N", help=f"small requests each way (default: {PAIRS})")
    parser.add_argument("--rate", type=_positive, metavar="R", help="requests a second (default: a modest one)")
    text = f"of the throughput run (default: {THROUGHPUT_SECONDS:g})"
    parser.add_argument("--seconds", type=_positive, default=THROUGHPUT_SECONDS, metavar="S", help=text)
    parser.add_argument("--prefixes", type=_count, default=PREFIXES, metavar="N", help=f"shared by it (default: {PREFIXES})")
    parser.add_argument("--prefix-tokens", type=_count, metavar="N", help="their length (default: the middle length above)")
    text = f"tokens of its answers (default: {ANSWER_TOKENS})"
    parser.add_argument("--answer-tokens", type=_count, default=ANSWER_TOKENS, metavar="N", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, each sample included, to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times to the first token into FILE, as SVG")


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
