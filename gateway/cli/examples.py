"""An example of each command, which its help ends with."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

EXAMPLES: Mapping[str, str] = {
    "": "serve --replicas 2",
    "serve": "serve Qwen/Qwen3-8B --replicas 2 -- --max-model-len 8192",
    "engine": "engine Qwen/Qwen3-8B --run-dir /run/peerkv -- --max-model-len 8192",
    "gateway": "gateway --run-dir /run/peerkv --port 8000",
    "doctor": "doctor --quick",
    "bench": "bench --start --lengths 1000 2000 --plot bench.svg",
    "quality": "quality Qwen/Qwen3-0.6B --codecs int8 --plot quality.svg",
    "kv": "kv stats --once",
    "kv stats": "kv stats --interval 5",
    "kv explain": "kv explain cmpl-8d2f0c",
    "kv prefixes": "kv prefixes --limit 20",
    "kv pin": "kv pin --messages system.json --replicas 2 --ttl 8h --renew",
    "kv unpin": "kv unpin 1f2e3d4c5b6a7988",
    "kv flush": "kv flush --port 8000",
    "kv ls": "kv ls --disk /var/cache/peerkv",
    "kv rm": "kv rm 8c1b77d0 --disk /var/cache/peerkv",
    "kv export": "kv export blocks.peerkv --disk /var/cache/peerkv",
    "kv import": "kv import blocks.peerkv --vault valkey://vault.lan:6379",
    "replicas": "replicas list",
    "replicas list": "replicas list --json",
    "replicas drain": "replicas drain replica-0",
    "replicas resume": "replicas resume replica-0",
    "replicas restart": "replicas restart --all --wait-seconds 600",
    "audit": "audit verify audit.jsonl",
    "audit verify": "audit verify audit.jsonl",
    "keys": "keys list --keys-file keys.toml",
    "keys add": "keys add alice --tokens-per-minute 60000 --keys-file keys.toml",
    "keys list": "keys list --keys-file keys.toml",
    "keys revoke": "keys revoke alice --keys-file keys.toml",
    "keys rotate": "keys rotate alice --grace 24h --keys-file keys.toml",
    "node-keys": "node-keys ~/peerkv-nodes node-a node-b",
    "vault": "vault --memory 64GiB --password-file /etc/peerkv/vault",
    "openapi": "openapi --check",
}
"""By the words behind `peerkv`."""
_VLLM = "Arguments after -- are passed to every vLLM server. "


def parsers_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of all commands below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers_of(below)


def add_examples(parser: argparse.ArgumentParser) -> None:
    """End the help of each command with its example. Raises KeyError for one without."""
    for each in parsers_of(parser):
        example = EXAMPLES[each.prog.removeprefix(parser.prog).strip()]
        each.epilog = f"{_VLLM if ' -- ' in example else ''}Example: {parser.prog} {example}"
