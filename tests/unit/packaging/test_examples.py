"""The programs of examples/ where they cannot do what they are for: they say why, and what to do. No engine is run."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.unit.packaging.files import REPOSITORY

MODELS = {"data": [{"id": "m"}]}
READY = {"replicas": [{"name": "replica-0", "ready": True}, {"name": "replica-1", "ready": True}]}
RUN_SECONDS_MAX = 60.0


def error(message: str, param: str = "") -> dict[str, Any]:
    return {"error": {"message": message, "param": param or None}}


class Gateway(ThreadingHTTPServer):
    """Answers by path with a status and a body, or one after the other of several; `key` is the only one that it knows."""

    def __init__(self, answers: dict[str, list[tuple[int, Any, str]]], key: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.answers, self.key = answers, key
        self.url = f"http://127.0.0.1:{self.server_port}"


class Asked(BaseHTTPRequestHandler):
    server: Gateway

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        known = self.server.answers[self.path]
        status, body, cache = known.pop(0) if len(known) > 1 else known[0]
        if self.server.key and self.headers.get("authorization") != f"Bearer {self.server.key}":
            status, body = 401, error("Incorrect API key.")
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.send_header("x-peerkv-cache", cache)
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving(gateway: Gateway) -> Iterator[Gateway]:
    with gateway:
        thread = threading.Thread(target=gateway.serve_forever)
        thread.start()
        try:
            yield gateway
        finally:
            gateway.shutdown()
            thread.join()


def run(gateway: Gateway, name: str, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, str(REPOSITORY / "examples" / name), "--url", gateway.url, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS_MAX, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def test_a_pin_without_its_tenant_says_how_to_name_it() -> None:
    refused = error("'tenant' is missing: each tenant has a cache of its own.", "tenant")
    with serving(Gateway({"/v1/models": [(200, MODELS, "")], "/kv/prefixes": [(400, refused, "")]})) as gateway:
        status, said = run(gateway, "pin_before_a_rush.py")
    assert status == 1
    assert "answered 400: 'tenant' is missing: each tenant has a cache of its own. Pass --tenant NAME" in said


def test_a_pin_with_a_wrong_key_says_which_flag() -> None:
    with serving(Gateway({"/v1/models": [(200, MODELS, "")]}, key="k")) as gateway:
        assert "401: Incorrect API key. Pass --key." in run(gateway, "pin_before_a_rush.py")[1]


def test_without_tenants_there_is_nothing_to_see() -> None:
    with serving(Gateway({"/v1/models": [(200, MODELS, "")]})) as gateway:
        status, said = run(gateway, "what_a_tenant_sees.py", "--keys", "a-key-1", "a-key-2")
    assert status == 1
    assert "no tenants to keep apart: make keys of two with `peerkv keys add NAME" in said


def test_a_key_that_nobody_has_is_shown_by_its_beginning() -> None:
    with serving(Gateway({"/v1/models": [(200, MODELS, "")]}, key="one-key-of-two")) as gateway:
        said = run(gateway, "what_a_tenant_sees.py", "--keys", "one-key-of-two", "wrong-key-of-two")[1]
    assert "401 to the key that begins with wron" in said
    assert "wrong-key" not in said


COLD, HIT, OTHER = [-0.5, -0.25], [-0.51, -0.25], [-0.9, -0.25]


@pytest.mark.parametrize(
    ("imported", "local", "status", "words"),
    [
        (COLD, COLD, 0, "import and cold run: tokens: the same"),
        (HIT, HIT, 0, "make serve ARGS='-- --dtype float32'"),
        (OTHER, HIT, 1, "differs from the cold run and from a hit in the replica's own cache"),
    ],
)
def test_an_import_that_differs_from_a_cold_run_is_compared_with_a_local_hit(
    imported: list[float], local: list[float], status: int, words: str
) -> None:
    answers = [
        (200, {"choices": [{"logprobs": {"tokens": ["a", "b"], "token_logprobs": each}}]}, cache)
        for each, cache in (
            (COLD, "local=0, peer=0, computed=70"),
            (imported, "local=0, peer=64, computed=6"),
            (local, "local=64, peer=0, computed=6"),
        )
    ]
    paths = {"/v1/models": [(200, MODELS, "")], "/ready": [(200, READY, "")], "/v1/completions": answers}
    with serving(Gateway(paths)) as gateway:
        ended, said = run(gateway, "compare_import.py")
    assert (ended, words in said) == (status, True), said
    assert ("float32" in said) == (imported is not COLD)
