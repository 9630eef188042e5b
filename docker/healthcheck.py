"""Exits 0 when the container does its work: `python healthcheck.py gateway|engine`.

The gateway answers /ready; the engine host's fleet.json names a replica that is ready.
"""

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

SECONDS_MAX = 4


def port() -> int:
    """Where the gateway listens. Kubernetes sets PEERKV_PORT=tcp://… for a service named peerkv."""
    given = os.environ.get("PEERKV_PORT", "")
    return int(given) if given.isdecimal() else 8000


def gateway() -> str:
    """Why the gateway is not ready, "" if it is."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port()}/ready", timeout=SECONDS_MAX):
            return ""
    except (urllib.error.URLError, OSError) as error:
        return str(error)


def engine() -> str:
    """Why no replica serves, "" if one does."""
    fleet = Path(os.environ["PEERKV_RUN_DIR"]) / "fleet.json"
    try:
        replicas = json.loads(fleet.read_bytes())["replicas"]
    except (OSError, ValueError, KeyError) as error:
        return f"{fleet}: {error}"
    states = {replica["name"]: replica["state"] for replica in replicas}
    return "" if "ready" in states.values() else f"no replica is ready: {states}"


if __name__ == "__main__":
    trouble = {"gateway": gateway, "engine": engine}[sys.argv[1]]()
    print(trouble or "ok")
    sys.exit(1 if trouble else 0)
