"""`python -m tests.fuzz`: requests that schemathesis makes of the OpenAPI document, valid and not, against a running gateway.

No answer may be a server error, or anything that the document does not say. Without `--url` a gateway is started over two
fake engines, which refuse what they cannot read as vLLM does; with it, any gateway is asked.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[2]
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance"),
    *("response_schema_conformance", "unsupported_method", "allow_header_conformance"),
)
NOT_ASKED = "^/replicas/.*/(drain|restart|resume)$"
"""What takes replicas away, after which 503 would be right."""
LIMITS = ("--requests-per-minute", "200", "--tokens-per-minute", "20000", "--n-max", "2", "--max-tokens-max", "64")
EXAMPLES = 100
TIMEOUT_SECONDS = 60
READY_SECONDS = 60.0


def main(argv: list[str] | None = None) -> int:
    """Returns schemathesis's exit status: 0 if nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--url", help="a running gateway (default: one is started)")
    parser.add_argument("--key", default="", help="its API key, and admin key")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help=f"cases of each operation (default: {EXAMPLES})")
    parser.add_argument("--phases", default="examples,coverage,fuzzing", help="of schemathesis (default: all but stateful)")
    parser.add_argument("--seed", type=int, default=0, help="of its choices (default: 0)")
    parser.add_argument("--cases-min", type=int, default=2000, help="fail with fewer cases than this (default: 2000)")
    parser.add_argument("--limited", action="store_true", help="by a tenant's key, whose limits many requests are beyond")
    given, more = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory(prefix="peerkv-fuzz-") as name:
        directory = Path(name)
        if given.url is not None:
            return fuzz(given, given.url, directory, more)
        keys = {}
        if given.limited:
            keys["PEERKV_KEYS_FILE"] = str(directory / "keys.toml")
            given.key = limited_key(directory / "keys.toml")
        with running_gateway(directory, keys) as url:
            return fuzz(given, url, directory, more)


def limited_key(file: Path) -> str:
    """Add a key with limits to a file; return it."""
    command = [sys.executable, "-m", "gateway.cli", "keys", "add", "fuzz", "--keys-file", str(file), "--json", *LIMITS]
    added = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=True)
    return str(json.loads(added.stdout)["key"])


def fuzz(given: argparse.Namespace, url: str, directory: Path, more: list[str]) -> int:
    """Run schemathesis. `more` are options of its own."""
    report = directory / "events.ndjson"
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--checks", ",".join(CHECKS)]
    command += ["--max-examples", str(given.examples), "--phases", given.phases, "--seed", str(given.seed)]
    command += ["--exclude-path-regex", NOT_ASKED, "--suppress-health-check", "all", "--warnings", "off"]
    command += ["--report", "ndjson", "--report-ndjson-path", str(report), "--continue-on-failure"]
    # Else most requests would be refused for it, and those with a short one get 504 as they asked.
    command += ["--header", f"x-request-timeout:{TIMEOUT_SECONDS}"]
    command += ["--header", f"Authorization:Bearer {given.key}"] if given.key else []
    status = subprocess.run([*command, *more], cwd=directory, check=False).returncode
    cases = asked(report)
    print(f"{cases} cases")
    return status or int(cases < given.cases_min)


def asked(report: Path) -> int:
    """How many requests were sent, by the events that schemathesis wrote."""
    count = 0
    for line in report.read_text("utf-8").splitlines():
        event = json.loads(line)
        for recorded in event.get("ScenarioFinished", {}).get("recorder", {}).get("interactions", {}).values():
            count += recorded is not None
    return count


@contextmanager
def running_gateway(directory: Path, settings: Mapping[str, str] = MappingProxyType({})) -> Iterator[str]:
    """`peerkv serve` over two fake engines that answer 400 to what they cannot read, with more `settings` as variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {
        "PEERKV_LAUNCHER": shlex.join([sys.executable, str(ROOT / "tests" / "fake_engine.py"), "--fake-core", "--fake-strict"]),
        "PEERKV_RUN_DIR": str(directory / "run"),
        "PEERKV_TABLE_DIR": str(directory / "tables"),
        "PEERKV_LOG_DIR": str(directory / "logs"),
        "PEERKV_PORT": str(port),
        "PEERKV_REPLICAS": "2",
        "PEERKV_HOST_MEMORY": "0",
        "PYTHONPATH": str(ROOT),
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PEERKV_")}
    with (directory / "gateway.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.cli", "serve"], env=kept | own | dict(settings), stdout=log, stderr=log
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + READY_SECONDS
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((directory / "gateway.log").read_text())
            time.sleep(0.1)
        yield url
        if process.poll() is not None:
            raise RuntimeError(f"the gateway ended: {(directory / 'gateway.log').read_text()[-4000:]}")
    finally:
        process.terminate()
        process.wait()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return all(replica["ready"] for replica in json.load(answer)["replicas"])
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(main())
