"""What the user sees in the terminal."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from engine.fleet import FleetSnapshot
from gateway.settings import Settings, address


def say(line: str) -> None:
    """Print one line of progress to stderr."""
    print(f"peerkv: {line}", file=sys.stderr, flush=True)


def curl_line(settings: Settings, model: str) -> str:
    """Return a shell command that requests a completion."""
    body = json.dumps({"model": model, "prompt": "The capital of France is", "max_tokens": 16}, ensure_ascii=False)
    key = " -H 'Authorization: Bearer YOUR_KEY'" if settings.tenants else ""
    return f"curl {address(settings)}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"


def _url_flag(url: str) -> str:
    """Return the flag `peerkv kv stats` needs to find this gateway from a shell without these settings."""
    fields = Settings.model_fields
    return "" if url == f"http://{fields['host'].default}:{fields['port'].default}" else f" --url {url}"


def banner(settings: Settings, snapshot: FleetSnapshot, log_dir: Path | None) -> str:
    """Return the lines shown once the gateway is serving."""
    url = address(settings)
    key = " -H 'Authorization: Bearer ADMIN_KEY'" if settings.admin_key else ""
    ready = len(snapshot.ready())
    lines = [
        "",
        f"  peerkv serves {snapshot.served_model_name} at {url}/v1 ({ready} of {len(snapshot.replicas)} replicas ready)",
        "",
        f"  try        {curl_line(settings, snapshot.served_model_name)}",
        f"  figures    curl {url}/kv/stats{key}    or    peerkv kv stats{_url_flag(url)}",
        f"  readiness  {url}/ready",
    ]
    if log_dir is not None:
        lines.append(f"  logs       {log_dir}")
    lines += ["  stop       Ctrl-C", ""]
    return "\n".join(lines)
