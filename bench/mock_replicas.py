"""Two mock replicas as peerkv sees them: sockets, fleet.json, and block tables that hold the documents' blocks and report what
was delivered."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.arms import KEY, TENANT
from bench.cases import CASES, MODEL, Endpoint, documents
from bench.limits import LIMITS
from engine.fleet import FleetSnapshot, Replica, ReplicaState, write_fleet
from gateway.prompts.tokenizer.engine_options import source_from_arguments
from gateway.prompts.tokenizer.service import TokenService
from gateway.tenants.key_file import write_keys
from gateway.tenants.keys import Key, Keys, digest_of
from gateway.tenants.salts import tenant_salt
from transport.fingerprint import fingerprint_digest
from transport.keys import chain_keys, root_key
from transport.table.deliveries import Delivery
from transport.table.layout import Description
from transport.table.writer import TableWriter

NAMES = ("replica-0", "replica-1")
BLOCK_SIZE = 16
BLOCKS = 1 << 17
TRANSPORT = "shared_memory"
SALT_SECRET = "what salts are made with in bench"
_FIELDS = {"weights": "bench", "dtype": "bfloat16"}
_TAG = re.compile(rb'"peerkv":\{[^}]*"tag":(\d+)')
_PROMPT = re.compile(rb'"(?:prompt|content)":["\[]')
_OPENING_BYTES = 64
"""This many bytes of a prompt's JSON, text or ids, are enough to tell the documents apart."""
_TEXT_BYTES_PER_TOKEN = 4


def write_config(directory: Path) -> Path:
    """Return a settings file with one tenant."""
    path, secret = directory / "peerkv.toml", directory / "salt-secret"
    secret.write_text(SALT_SECRET)
    path.write_text(f'salt_secret_file = "{secret}"\n[[tenants]]\nname = "{TENANT}"\napi_key = "{KEY}"\n')
    return path


def write_limited_config(directory: Path) -> Path:
    """Return a settings file with the same tenant's key in a keys file, with every limit and none that is ever reached."""
    path, keys, secret = directory / "limited.toml", directory / "keys.toml", directory / "salt-secret"
    secret.write_text(SALT_SECRET)
    write_keys(
        keys,
        Keys(salt_secret="ab" * 32, keys=(Key(name=TENANT, tenant=TENANT, sha256=digest_of(KEY.encode()).hex(), **LIMITS),)),
    )
    path.write_text(f'salt_secret_file = "{secret}"\nkeys_file = "{keys}"\nlimits_file = "{directory / "limits.json"}"\n')
    return path


def write_run_dir(run_dir: Path, table_dir: Path, model: str, pid: int) -> list[str]:
    """Write a fleet.json with two ready replicas of process `pid`; return their sockets."""
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    sockets = [str(run_dir / f"{name}.sock") for name in NAMES]
    replicas = tuple(
        Replica(name, ReplicaState.READY, path, pid, 0, "", "cpu", "") for name, path in zip(NAMES, sockets, strict=True)
    )
    write_fleet(run_dir, FleetSnapshot(1, model, MODEL, str(table_dir), replicas))
    return sockets


class Holders:
    """The replicas' tables. Document i of each length is held by replica i modulo 2, with and without the tenant."""

    def __init__(self, table_dir: Path, model: str, endpoint: Endpoint) -> None:
        tokens = TokenService(source_from_arguments(model, ()))
        tokens.load()
        salts = ("", tenant_salt(SALT_SECRET.encode(), TENANT))
        fingerprint = fingerprint_digest(_FIELDS)
        self._writers = [
            TableWriter(table_dir, Description(name, os.getpid(), "xxh3_128", TRANSPORT, "ok", _FIELDS, ()), BLOCK_SIZE, BLOCKS)
            for name in NAMES
        ]
        self._held: list[dict[bytes, int]] = [{} for _ in NAMES]
        used = [0 for _ in NAMES]
        for size in sorted({case.characters for case in CASES}):
            for number, text in enumerate(documents(size)):
                ids = _ids(tokens, text, endpoint)
                held = len(ids) // BLOCK_SIZE * BLOCK_SIZE
                for opening in (text.encode(), msgspec.json.encode(list(ids))[1:]):
                    self._held[number % len(NAMES)][opening[:_OPENING_BYTES]] = held
                for salt in salts:
                    keys = chain_keys(root_key(fingerprint, salt), ids, BLOCK_SIZE)
                    place = number % len(NAMES)
                    first = used[place]
                    used[place] += len(keys)
                    self._writers[place].publish(range(first, first + len(keys)), keys)

    def deliver(self, place: int, body: bytes) -> None:
        """Record a request to replica `place` as an engine does before its first token, if the gateway tagged it."""
        tag = _TAG.search(body)
        prompt = _PROMPT.search(body)
        if tag is None or prompt is None:
            return
        now = time.monotonic_ns()
        start = prompt.end()
        local = self._held[place].get(body[start : start + _OPENING_BYTES], 0)
        if body[start - 1] == ord("["):
            tokens = body.count(b",", start, body.index(b"]", start)) + 1
        else:
            tokens = max(local + 1, len(body) // _TEXT_BYTES_PER_TOKEN)
        delivery = Delivery(
            tag=int(tag.group(1)),
            arrived_ns=now,
            asked_ns=now,
            scheduled_ns=now,
            first_token_ns=now,
            prompt_tokens=tokens,
            local_tokens=local,
            computed_tokens=tokens - local,
        )
        self._writers[place].deliver(delivery, TRANSPORT)

    def close(self) -> None:
        """Remove the tables."""
        for writer in self._writers:
            writer.close()


def _ids(tokens: TokenService, text: str, endpoint: Endpoint) -> Sequence[int]:
    if endpoint == "completions":
        return tokens.encode(text)
    return tokens.encode_chat({"messages": [{"role": "user", "content": text}]})
