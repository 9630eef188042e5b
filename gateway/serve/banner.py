"""What the user sees in the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.fleet import FleetSnapshot
from gateway.settings import Settings, address

COMMAND = "peerkv"


def say(line: str) -> None:
    """Print one line of progress to stderr. Where nobody can read it, on a terminal that is gone or a full disk, it is lost."""
    with contextlib.suppress(OSError):
        print(f"peerkv: {line}", file=sys.stderr, flush=True)


def command() -> str:
    """What runs this program from a shell that does not know its environment: "peerkv" where that is it, else its path."""
    own = Path(sys.argv[0])
    if own.name != COMMAND:  # python -m gateway.cli, or a test
        return f"{shlex.quote(sys.executable)} -m gateway.cli"
    found = shutil.which(COMMAND)
    if found is not None and own.exists() and os.path.samefile(found, own):
        return COMMAND
    return shlex.quote(str(own.absolute()))


def curl_line(settings: Settings, model: str) -> str:
    """Return a shell command that requests a completion."""
    body = json.dumps({"model": model, "prompt": "The capital of France is", "max_tokens": 16}, ensure_ascii=False)
    key = ' -H "Authorization: Bearer $YOUR_KEY"' if settings.tenants or settings.keys_file else ""
    return f"curl {address(settings)}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"


def _flags(settings: Settings) -> str:
    """Return the flags `peerkv kv stats` needs to find this gateway from a shell without these settings."""
    url, fields = address(settings), Settings.model_fields
    flags = "" if url == f"http://{fields['host'].default}:{fields['port'].default}" else f" --url {url}"
    return flags + (' --admin-key "$PEERKV_ADMIN_KEY"' if settings.admin_key else "")


def banner(settings: Settings, snapshot: FleetSnapshot, log_dir: Path | None, warnings: Sequence[str] = ()) -> str:
    """Return the lines shown once the gateway is serving. Keys are not shown: the commands read them from shell variables."""
    url = address(settings)
    ready = len(snapshot.ready())
    lines = [
        "",
        f"  peerkv serves {snapshot.served_model_name} at {url}/v1 ({ready} of {len(snapshot.replicas)} replicas ready)",
        "",
        f"  try        {curl_line(settings, snapshot.served_model_name)}",
        f"  figures    {command()} kv stats{_flags(settings)}",
        f"  page       {url}/ui",
        f"  readiness  curl {url}/ready",
    ]
    if not settings.admin_key:
        lines.append("  admin      callers on this machine; behind any proxy set an admin key (PEERKV_ADMIN_KEY)")
    if settings.host_memory and log_dir is not None:
        lines.append(f"  tiers      host memory {settings.host_memory >> 20} MiB, shared by all replicas")
    if log_dir is not None:
        lines.append(f"  logs       {log_dir}")
    lines += ["  stop       Ctrl-C", *(f"  warning    {warning}" for warning in warnings), ""]
    return "\n".join(lines)
