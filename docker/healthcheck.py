"""Exits 0 when the container does its work, else 1 with a line that says why not: `python healthcheck.py gateway|engine`.

The gateway answers /ready; the engine host's fleet.json, or that of one of its models, names a replica that is ready.
"""

import http.client
import json
import os
import ssl
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

SECONDS_MAX = 4
ANSWER_BYTES_MAX = 1 << 20
LINE_CHARS_MAX = 1000


def setting(name: str) -> str:
    """A setting of the environment or else of the settings' file; "" if neither has it.

    Kubernetes sets PEERKV_PORT=tcp://… for a service named peerkv: that is no setting.
    """
    given = os.environ.get(f"PEERKV_{name.upper()}", "")
    given = "" if "://" in given else given
    if given or not (file := os.environ.get("PEERKV_CONFIG", "")):
        return given
    try:
        return str(tomllib.loads(Path(file).read_text("utf-8")).get(name, ""))
    except (OSError, ValueError):  # then the gateway does not run, which is what is told
        return ""


def port() -> int:
    """Where the gateway listens."""
    given = setting("port")
    return int(given) if given.isdecimal() else 8000


def gateway() -> str:
    """Why the gateway is not ready, "" if it is."""
    url = f"{'https' if setting('tls_cert') else 'http'}://127.0.0.1:{port()}/ready"
    unchecked = ssl.create_default_context()  # it is asked of this container alone, and nothing secret is sent
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    # without the environment's proxy, which knows another 127.0.0.1
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unchecked))
    try:
        with opener.open(url, timeout=SECONDS_MAX):
            return ""
    except urllib.error.HTTPError as error:
        return f"{url}: {error.code} {_reason(error)}"
    except (OSError, http.client.HTTPException) as error:
        return f"{url}: {getattr(error, 'reason', '') or str(error) or type(error).__name__}"


def _reason(error: urllib.error.HTTPError) -> str:
    """Why the gateway says that it is not ready."""
    try:
        return str(json.loads(error.read(ANSWER_BYTES_MAX))["reason"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return error.reason


def engine() -> str:
    """Why no replica serves, "" if one does."""
    directory = os.environ.get("PEERKV_RUN_DIR", "")
    if not directory:
        return "PEERKV_RUN_DIR is not set"
    fleet = Path(directory) / "fleet.json"
    of_models = sorted(fleet.parent.parent.glob(f"{fleet.parent.name}-*/{fleet.name}"))  # where there are several
    found = [each for file in of_models or [fleet] for each in _replicas(file)]
    return "" if "" in found else "no replica is ready: " + ("; ".join(found) or "there is none")


def _replicas(file: Path) -> Iterator[str]:
    """Why each replica of a fleet does not serve, "" for one that does."""
    try:
        for replica in json.loads(file.read_bytes())["replicas"]:
            state, why = replica["state"], replica.get("reason", "")
            yield "" if state == "ready" else f"{replica['name']} is {state}" + (f" ({why})" if why else "")
    except FileNotFoundError:
        yield f"{file} is not there: the engine host has not begun"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{file} cannot be read: {error!r}"


def main(arguments: list[str]) -> int:
    """Print one line, and return the exit status."""
    checks = {"gateway": gateway, "engine": engine}
    if len(arguments) != 1 or arguments[0] not in checks:
        print(f"say what is to be looked at: {' or '.join(checks)}")
        return 2
    trouble = checks[arguments[0]]()
    print(" ".join(trouble.split())[:LINE_CHARS_MAX] or "ok")
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
