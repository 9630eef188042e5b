"""What the user sees in the terminal."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from engine.fleet import FleetSnapshot, Replica
from engine.replicas.lifecycle import LOADING
from gateway.http_server.certificate import names_of
from gateway.settings import Settings, address
from gateway.tenants.loopback import is_loopback

COMMAND = "peerkv"
ADMIN_KEY_VARIABLE = "PEERKV_ADMIN_KEY"
LOG_LINE_SHOWN = 120


def say(line: str) -> None:
    """Print one line of progress to stderr. Where nobody can read it, on a terminal that is gone or a full disk, it is lost."""
    with contextlib.suppress(OSError):
        print(f"peerkv: {line}", file=sys.stderr, flush=True)


def still_starting(replica: Replica, last_line: str) -> str:
    """Say what a replica does that starts, by its last line in the log: there is none before vLLM is imported."""
    doing = last_line[:LOG_LINE_SHOWN] or ("importing vLLM" if replica.reason == LOADING else replica.reason)
    return f"{replica.name} is still starting: {doing}"


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
    url, curl = _for_clients(settings)
    body = json.dumps({"model": model, "prompt": "The capital of France is", "max_tokens": 16}, ensure_ascii=False)
    key = ' -H "Authorization: Bearer $YOUR_KEY"' if settings.tenants or settings.keys_file else ""
    return f"{curl} {url}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"


def _flags(settings: Settings) -> str:
    """Return the flags `peerkv kv stats` needs to find this gateway from a shell without these settings."""
    (url, _), fields = _for_clients(settings), Settings.model_fields
    flags = "" if url == f"http://{fields['host'].default}:{fields['port'].default}" else f" --url {url}"
    if settings.tls_cert is not None:
        flags += f" --cacert {_quoted(settings.tls_cert)}"
    if settings.admin_key is None:
        return flags
    in_shell = os.environ.get(ADMIN_KEY_VARIABLE) == settings.admin_key.get_secret_value()
    return f'{flags} --admin-key "${ADMIN_KEY_VARIABLE}"' if in_shell else f"{flags} --admin-key …"


def _for_clients(settings: Settings) -> tuple[str, str]:
    """The URL that a client of this machine takes, under a name that the certificate has, and the curl that takes it."""
    url = address(settings)
    if settings.tls_cert is None or settings.tls_key is None:
        return url, "curl"
    curl, host = f"curl --cacert {_quoted(settings.tls_cert)}", urlsplit(url).hostname or ""
    names = names_of(settings.tls_cert, settings.tls_key)
    if not names or any(_fits(host, name) for name in names):
        return url, curl
    if is_loopback(host) and "localhost" in names:
        return f"https://localhost:{settings.port}", curl
    name = next((name for name in names if "*" not in name and not _is_address(name)), "")
    if not name:
        return url, curl
    return f"https://{name}:{settings.port}", f"{curl} --resolve {name}:{settings.port}:{host}"


def _fits(host: str, name: str) -> bool:
    if _is_address(host) or _is_address(name):
        return _is_address(host) and _is_address(name) and ipaddress.ip_address(host) == ipaddress.ip_address(name)
    return host.lower() == name.lower() or (name.startswith("*.") and host.lower().partition(".")[2] == name[2:].lower())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _quoted(path: Path) -> str:
    return shlex.quote(str(path.absolute()))


def banner(settings: Settings, fleets: Sequence[FleetSnapshot], log_dir: Path | None, warnings: Sequence[str] = ()) -> str:
    """Return the lines shown once the gateway is serving. Keys are not shown: the commands read them from shell variables."""
    (url, curl), own = _for_clients(settings), address(settings)
    lines = [
        "",
        *(f"  peerkv serves {fleet.served_model_name} at {own}/v1 ({_ready(fleet)} replicas ready)" for fleet in fleets),
        "",
        f"  try        {curl_line(settings, fleets[0].served_model_name)}",
        f"  figures    {command()} kv stats{_flags(settings)}",
        f"  page       {url}/ui",
        f"  readiness  {curl} {url}/ready",
    ]
    if not settings.admin_key:
        lines.append("  admin      callers on this machine; behind any proxy set an admin key (PEERKV_ADMIN_KEY)")
    if log_dir is not None and len(fleets) == 1 and (tiers := _tiers(settings)):
        lines.append(f"  tiers      {tiers}")
    if log_dir is not None:
        lines.append(f"  logs       {log_dir}")
    lines += ["  stop       Ctrl-C", *(f"  warning    {warning}" for warning in warnings), ""]
    return "\n".join(lines)


def _ready(fleet: FleetSnapshot) -> str:
    return f"{len(fleet.ready())} of {len(fleet.replicas)}"


def _tiers(settings: Settings) -> str:
    """Where blocks go that leave the KV caches; "" if they are lost."""
    found = []
    if isinstance(settings.host_memory, int) and settings.host_memory:  # of `auto`, only who starts the replicas knows
        found.append(f"host memory {settings.host_memory >> 20} MiB, shared by all replicas")
    if settings.disk is not None:
        found.append(f"disk {settings.disk}, {settings.disk_bytes / (1 << 30):g} GiB")
    if settings.vault is not None:
        found.append("a vault")
    return "; ".join(found)
