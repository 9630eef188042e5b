"""Command-line flags made from the settings: one for each but WITHOUT_FLAG, with its description, default and an example."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gateway.cli.flag_groups import GROUPS, example, size_in_words, unit_of
from gateway.settings import Settings

WITHOUT_FLAG = frozenset(
    {
        "models",  # structured
        "tenants",  # structured, and hold secrets
        "vllm_args",  # follow "--"
        "launcher",  # for tests
        # Times and sizes inside that tests shorten and nobody else has had to change.
        "backoff_seconds_max",
        "backoff_seconds_min",
        "body_inline_bytes_max",
        "body_seconds_max",
        "claim_seconds_max",
        "client_stall_seconds_max",
        "connect_seconds",
        "control_seconds",
        "core_frozen_seconds_max",
        "core_silent_seconds_max",
        "eject_seconds_max",
        "eject_seconds_min",
        "header_bytes_max",
        "health_failures_max",
        "health_interval_seconds",
        "health_timeout_seconds",
        "healthy_seconds_reset",
        "keep_alive_seconds",
        "miss_seconds_apart",
        "overdue_seconds_min",
        "prefix_seconds_max",
        "reservation_seconds_max",
        "prefixes_kept_tokens_max",
        "send_chat_ids",
        "terminate_seconds",
        "tokenize_inline_chars_max",
        "upstream_idle_seconds",
    }
)
"""Set by a variable or in the file alone."""
PATH_DEFAULTS = {
    "run_dir": "$XDG_RUNTIME_DIR/peerkv/PORT or /tmp/peerkv-UID/PORT",
    "table_dir": "/dev/shm/peerkv-UID/PORT",
    "log_dir": "~/.local/state/peerkv/logs/PORT",
    "limits_file": "~/.local/state/peerkv/limits/PORT.json",
}
_METAVARS: dict[Any, str] = {int: "N", float: "N", Path: "DIR"}
_METAVARS_OF = {
    "replicas": "N|auto",
    "request_log": "FILE|-",
    "vault": "URL",
    "limits_valkey": "URL",
    "join": "URL",
    "otlp_traces_endpoint": "URL",
    "cors_origins": "URLS",
    "host": "ADDRESS",
    "node_address": "ADDRESS:PORT",
    "node_peers": "NODES",
    "namespace": "NAME",
    "model_aliases": "NAMES",
    "disk": "DIR",
    "host_memory_dir": "DIR",
    "node_keys": "DIR",
}
"""For settings whose type and unit do not tell what stands for the value."""


def add_settings_flags(parser: argparse.ArgumentParser, *, leave_out: Iterable[str] = ()) -> None:
    """Add a flag for each setting, in the groups of GROUPS.

    A flag that is not given is None, so that the environment and the file apply.
    """
    out = WITHOUT_FLAG | set(leave_out)
    placed = {name for names in GROUPS.values() for name in names}
    rest = {name: "" for name in Settings.model_fields if name not in placed | out}
    for title, examples in [*GROUPS.items(), *([("further settings", rest)] if rest else [])]:
        group = parser.add_argument_group(title)
        for name, value in examples.items():
            if name not in out:
                _add(group, name, Settings.model_fields[name], value)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings in TOML (default: $PEERKV_CONFIG; for example --config peerkv.toml)",
    )


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings among the parsed flags."""
    return {name: value for name, value in vars(arguments).items() if name in Settings.model_fields}


def _add(parser: Any, name: str, field: FieldInfo, value: str) -> None:
    flag = "--" + name.replace("_", "-")
    shown = f"; for example {example(name, value)}" if value else ""
    text = f"{field.description} (default: {_default(name, field)}{shown})".replace("%", "%%")
    options: dict[str, Any] = {"dest": name, "default": None, "help": text}
    kinds = _kinds(field.annotation)
    if name.endswith(("_file", "tls_cert", "tls_key", "audit_log")):
        parser.add_argument(flag, metavar="FILE", **options)
    elif kinds == {bool}:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    elif len(kinds) == 1 and typing.get_origin(choice := next(iter(kinds))) is typing.Literal:
        parser.add_argument(flag, choices=typing.get_args(choice), **options)
    else:
        number = unit_of(name) or next((_METAVARS[kind] for kind in kinds if kind in _METAVARS), name.split("_")[-1].upper())
        parser.add_argument(flag, metavar=_METAVARS_OF.get(name, number), **options)


def _kinds(annotation: Any) -> set[Any]:
    """The types that a value may have, without None."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return {kind for kind in typing.get_args(annotation) if kind is not type(None)}
    return {annotation}


def _default(name: str, field: FieldInfo) -> str:
    if name in PATH_DEFAULTS:
        return PATH_DEFAULTS[name]
    if field.default is None or field.default is PydanticUndefined:
        return "unset"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    if field.default in ("", ()):
        return "none"
    if isinstance(field.default, float):
        return f"{field.default:g}"
    return size_in_words(name, field.default) if type(field.default) is int else str(field.default)
