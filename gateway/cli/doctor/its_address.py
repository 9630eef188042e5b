"""What has the gateway's address: nothing, another program, or a gateway, which can be asked as other commands ask it."""

from __future__ import annotations

import errno
import http.client
import json
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from gateway.cli.asking import CommandFailed, ask, client_at
from gateway.cli.trust import trust

READY_SECONDS = 2.0
READY_BYTES_MAX = 1 << 20


def port_error(host: str, port: int) -> str:
    """Return why a server could not listen there now; "" if it could."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return ""
    except OSError as error:
        return "in use" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))


def gateway_at(host: str, port: int) -> str:
    """The URL of the program that listens there, if it answers like a peerkv gateway, else ""."""
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    place = f"[{here}]:{port}" if ":" in here else f"{here}:{port}"
    for scheme in ("http", "https"):
        _, body = _asked(f"{scheme}://{place}/ready")
        try:
            said = json.loads(body)
        except ValueError:
            continue
        if isinstance(said, dict) and "ready" in said and "replicas" in said:
            return f"{scheme}://{place}"
    return ""


def wants_admin_key(url: str) -> bool:
    """Whether the gateway there has an admin key, wherever it got it from: then it answers nobody without it."""
    return _asked(url + "/kv/stats")[0] == http.HTTPStatus.UNAUTHORIZED


def refusal(url: str, key: str, cacert: Path | None, own: Path | None) -> str:
    """Why commands with this admin key, and these certificates to trust, get nothing from the gateway there; "" if they do.

    Raises SettingsError.
    """
    with client_at(url, key, trust(url, cacert, own)) as client:
        try:
            ask(client, "/kv/stats" if key else "/health", also=(http.HTTPStatus.SERVICE_UNAVAILABLE,))  # it starts
        except CommandFailed as error:
            return str(error)
    return ""


def _asked(url: str) -> tuple[int, bytes]:
    """The status and the body of what a server answers to a GET without a key; 0 if it does not."""
    unchecked = ssl.create_default_context()  # nothing secret is sent: whoever answers is only asked who it is
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unchecked))
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=READY_SECONDS) as answer:
            return answer.status, answer.read(READY_BYTES_MAX)
    except urllib.error.HTTPError as error:  # 503 while no replica is ready
        return error.code, error.read(READY_BYTES_MAX)
    except (OSError, ValueError, http.client.HTTPException):
        return 0, b""
