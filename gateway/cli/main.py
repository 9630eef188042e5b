"""The command line: every command of `peerkv`; `build_parser` lists them.

Exit status: 0 after a clean end, 1 if something failed, 2 for wrong usage or settings, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Coroutine, Sequence, Set
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gateway import __version__
from gateway.cli import audit, keys, kv_explain, kv_frames, kv_prefixes, node_keys, quality, replicas, vault
from gateway.cli import kv_stats as kv_live
from gateway.cli.asking import add_gateway_flags
from gateway.cli.bench import flags as bench_flags
from gateway.cli.examples import add_examples
from gateway.cli.flag_groups import OF_GATEWAY, OF_REPLICAS, WholeFlags
from gateway.cli.flags import add_settings_flags, given_settings
from gateway.cli.unknown_flags import unknown_words
from gateway.errors import GatewayError, SettingsError
from gateway.settings import Settings, load

EXIT_FAILED = 1
EXIT_USAGE = 2
_NEGATIVE_SIZE = re.compile(r"-[0-9.]+[A-Za-z]+")
_PORTS = {"http": 80, "https": 443}
_BENCH_ABOUT = (
    "Measure a running installation from the outside: the time to the first token of prompts that no replica has (cold), that "
    "another replica computed (import) and that the same replica computed (local hit); the time the gateway adds to a small "
    "request; and throughput at a fixed rate with shared prefixes. Prompts are random words. Takes about two minutes on "
    "two CPU cores."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` name; returns the exit status."""
    _settle_home()
    given = list(sys.argv[1:] if arguments is None else arguments)
    vllm_args: list[str] | None = None
    if "--" in given:
        cut = given.index("--")
        given, vllm_args = given[:cut], given[cut + 1 :]
    parsed, unknown = build_parser().parse_known_args(_with_negative_sizes(given))
    if unknown:
        return _fail(unknown_words(parsed.parser, unknown, takes_vllm_args=parsed.takes_vllm_args), EXIT_USAGE)
    if vllm_args is not None and not parsed.takes_vllm_args:
        return _fail("arguments after -- are for vLLM, but this command does not start it", EXIT_USAGE)
    parsed.vllm_args = vllm_args
    try:
        status: int = parsed.run(parsed)
        return status
    except SettingsError as error:
        return _fail(str(error), EXIT_USAGE)
    except GatewayError as error:
        return _fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return 130


def _with_negative_sizes(words: Sequence[str]) -> list[str]:
    """The same with a flag and such as -1GiB in one word: argparse takes it for another flag, and misses a value."""
    found: list[str] = []
    for word in words:
        if _NEGATIVE_SIZE.match(word) and found and found[-1].startswith("--") and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _settle_home() -> None:
    """Give a user without a home directory, as in containers, the one that those give: what cannot be written there is said."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="peerkv",
        description="An OpenAI-compatible gateway for vLLM replicas that import each other's KV cache.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"peerkv {__version__}")
    parser.set_defaults(takes_vllm_args=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_runner(commands, "serve", _serve, "start the replicas and the gateway", vllm=True)
    _add_runner(
        commands, "engine", _engine, "start only the replicas, for a gateway with the same run_dir", OF_GATEWAY, vllm=True
    )
    _add_runner(commands, "gateway", _gateway, "start only the gateway, for replicas that `peerkv engine` runs", OF_REPLICAS)
    _add_doctor(commands)
    _add_bench(commands)
    _add_quality(commands)
    _add_kv(commands)
    replicas.add_commands(commands)
    audit.add_commands(commands)
    keys.add_commands(commands)
    node_keys.add_commands(commands)
    vault.add_command(commands)
    _add_openapi(commands)
    add_examples(parser)
    return parser


def _add_runner(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    leave_out: Set[str] = frozenset(),
    *,
    vllm: bool = False,
) -> None:
    usage = f"peerkv {name} [flags]{' [MODEL] [-- flags of vLLM]' if vllm else ''}"
    about: dict[str, Any] = {"help": summary, "usage": usage, "description": summary}
    parser = commands.add_parser(name, **about, allow_abbrev=False, formatter_class=WholeFlags)
    if vllm:
        text = "directory or hub id of the model (default: SmolLM2-135M-Instruct, downloaded once; for example Qwen/Qwen3-8B)"
        parser.add_argument("model", nargs="?", metavar="MODEL", help=text)
    add_settings_flags(parser, leave_out=leave_out | {"model"})
    parser.set_defaults(run=run, parser=parser, takes_vllm_args=vllm)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "show what this machine has, what the replicas can exchange, and what should be fixed"
    about = f"{summary[0].upper()}{summary[1:]}. With an admin key or --cacert, a gateway that runs is asked with them, too."
    parser = commands.add_parser("doctor", help=summary, description=about, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON (default: text)")
    parser.add_argument("--quick", action="store_true", help="skip measuring the links between GPUs, which takes about 10 s")
    add_gateway_flags(parser)
    parser.add_argument("--host", metavar="ADDRESS", help="the gateway's host (default: as for serve)")
    parser.add_argument("--run-dir", metavar="DIR", help="the gateway's run_dir (default: as for serve)")
    parser.set_defaults(run=_doctor, parser=parser)


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "measure a running installation: time to first token, gateway overhead, throughput"
    parser = commands.add_parser("bench", help=summary, description=_BENCH_ABOUT, allow_abbrev=False)
    bench_flags.add_arguments(parser)
    parser.set_defaults(run=_bench, parser=parser)


def _add_quality(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "measure what codecs do to a model's answers: bytes, divergence, perplexity"
    parser = commands.add_parser("quality", help=summary, description=quality.ABOUT, allow_abbrev=False)
    quality.add_arguments(parser)
    parser.set_defaults(run=quality.run, parser=parser)


def _add_kv(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "inspect the caches and decide what they keep"
    parser = commands.add_parser("kv", help=summary, description=summary)
    views = parser.add_subparsers(metavar="VIEW", required=True)
    summary = "live table of where prompt tokens came from"
    stats = views.add_parser("stats", help=summary, description=summary, allow_abbrev=False)
    kv_live.add_arguments(stats)
    stats.set_defaults(run=kv_live.run, parser=stats)
    summary = "explain why a request was served the way it was"
    explained = views.add_parser("explain", help=summary, description=summary, allow_abbrev=False)
    kv_explain.add_arguments(explained)
    explained.set_defaults(run=kv_explain.run, parser=explained)
    kv_prefixes.add_views(views)
    kv_frames.add_views(views)


def _add_openapi(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "write the OpenAPI document, or check that the file is current"
    parser = commands.add_parser("openapi", help=summary, description=summary, allow_abbrev=False)
    parser.add_argument(
        "--check", action="store_true", help="only compare; exit with status 1 if the file differs (default: write it)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the file (default: openapi/openapi.json of a checkout)")
    parser.set_defaults(run=_openapi, parser=parser)


def _settings(parsed: argparse.Namespace) -> Settings:
    settings = load(given_settings(parsed), parsed.config)
    level = settings.log_level.upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    if level != "DEBUG":
        logging.getLogger("uvicorn.error").setLevel("WARNING")
        logging.getLogger("httpx").setLevel("WARNING")
    return settings


def _serve(parsed: argparse.Namespace) -> int:
    from gateway.serve.run import serve

    return _run(serve, _settings(parsed), _again(parsed))


def _engine(parsed: argparse.Namespace) -> int:
    from gateway.serve.run import engine

    return _run(engine, _settings(parsed), _again(parsed))


def _gateway(parsed: argparse.Namespace) -> int:
    from gateway.serve.run import gateway

    return _run(gateway, _settings(parsed), _again(parsed))


def _again(parsed: argparse.Namespace) -> Callable[[], Settings]:
    return lambda: load(given_settings(parsed), parsed.config)


def _run(
    work: Callable[[Settings, Callable[[], Settings]], Coroutine[None, None, None]],
    settings: Settings,
    again: Callable[[], Settings],
) -> int:
    from gateway.serve.signals import run_until_stopped

    return run_until_stopped(lambda: work(settings, again))


def _doctor(parsed: argparse.Namespace) -> int:
    from gateway.cli.doctor import report as doctor

    if parsed.url is not None:
        parsed.host, parsed.port = _address_of(parsed.url)
    return doctor.run(_settings(parsed), as_json=parsed.json, measure_links=not parsed.quick, cacert=parsed.cacert)


def _address_of(url: str) -> tuple[str, int]:
    """Host and port of a gateway's URL. Raises SettingsError."""
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host:
        raise SettingsError(f"--url: '{url}' is no URL of a gateway, such as http://127.0.0.1:8000")
    return host, port or _PORTS.get(parts.scheme, _PORTS["http"])


def _bench(parsed: argparse.Namespace) -> int:
    from gateway.cli.bench import command

    return command.run(parsed)


def _openapi(parsed: argparse.Namespace) -> int:
    from gateway.admin.offline_document import document
    from gateway.admin.openapi import check, kept_in, write

    path = parsed.output or kept_in(Path())
    if parsed.check:
        check(document(), path)
        print(f"{path} is what the gateway serves")
    else:
        write(document(), path)
        print(f"wrote {path}")
    return 0


def _fail(message: str, status: int) -> int:
    print(f"peerkv: error: {message}", file=sys.stderr)
    return status
