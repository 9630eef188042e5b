"""The profile `vault`: what an engine's container held is restored from the vault's after that engine is gone."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.containers.stack import BACK_SECONDS_MAX, SERVICES, Stack, long_prompt, podman, until
from tests.real.fleet import free_port

BLOCK = 32
# 42 blocks for a replica, and as many slots: a few prompts push everything out of both.
SMALL = "--kv-cache-memory-bytes 67108864 --max-model-len 1280"
PROMPTS = 6
WORDS = 150
STORED_SECONDS_MAX = 60.0


@pytest.fixture(scope="module")
def vaulted(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The containers with the profile `vault` as well, their engines with small memories; afterwards they are as before."""
    home = tmp_path_factory.mktemp("vault")
    password = home / "password"
    password.write_text(secrets.token_hex(16))
    password.chmod(0o444)
    before = dict(stack.env)
    stack.down()
    stack.env |= {
        "COMPOSE_PROFILES": before["COMPOSE_PROFILES"] + ",vault",
        "VAULT_PASSWORD_FILE": str(password),
        "VAULT_PORT": str(free_port()),
        "PEERKV_VAULT": "valkey://vault:6379",
        "PEERKV_DISK": "",  # what is restored shall come from the vault
        "PEERKV_VLLM_ARGS": SMALL,
        "PEERKV_TIER_WAIT_SECONDS_MAX": "20",
    }
    try:
        stack.up(*SERVICES, "vault")
        stack.wait_ready()
        yield stack
    finally:
        stack.down()
        stack.env.clear()
        stack.env.update(before)
        stack.up()
        stack.wait_ready()


def vault_of(stack: Stack) -> dict[str, Any]:
    """What /kv/stats says of the vault."""
    (found,) = stack.stats()["tiers"]["stores"]
    assert found["name"] == "vault"
    return dict(found)


def in_use(stack: Stack) -> bool:
    return bool(vault_of(stack)["state"] == "ok")


def test_what_an_engine_held_is_restored_from_the_vault_after_its_container_was_killed(vaulted: Stack) -> None:
    until(lambda: in_use(vaulted), BACK_SECONDS_MAX, "the vault is in use")
    prompt = long_prompt(WORDS)
    cold, hit = (vaulted.complete(prompt, "replica-0").raise_for_status().json() for _ in range(2))
    for _ in range(PROMPTS):
        vaulted.complete(long_prompt(WORDS), "replica-0").raise_for_status()
    whole = (cold["usage"]["prompt_tokens"] - 1) // BLOCK * BLOCK
    until(lambda: vault_of(vaulted)["stored_frames"] > whole // BLOCK, STORED_SECONDS_MAX, "its blocks are in the vault")
    os.kill(vaulted.inspect("engine-cpu")["State"]["Pid"], signal.SIGKILL)  # not by podman, which would not restart it
    until(lambda: not vaulted.is_ready(), BACK_SECONDS_MAX, "the engines are gone")
    vaulted.wait_ready()
    until(lambda: in_use(vaulted), BACK_SECONDS_MAX, "the vault is in use again")
    before = vaulted.stats()["totals"]["tokens"]["vault"]
    restored = vaulted.complete(prompt, "replica-1").raise_for_status().json()
    assert restored["usage"]["prompt_tokens_details"]["cached_tokens"] == whole
    assert hit["usage"]["prompt_tokens_details"]["cached_tokens"] == whole
    assert restored["choices"][0]["text"] == hit["choices"][0]["text"]  # the rest is computed alike, in bfloat16
    assert vaulted.stats()["totals"]["tokens"]["vault"] == before + whole


def test_a_vault_that_is_gone_is_a_miss_and_one_that_is_back_is_used(vaulted: Stack) -> None:
    podman("stop", "-t", "1", vaulted.container("vault"))
    assert vaulted.complete(long_prompt(WORDS), "replica-0").status_code == 200
    until(lambda: not in_use(vaulted), BACK_SECONDS_MAX, "/kv/stats tells that the vault is gone")
    vaulted.up("vault")
    until(lambda: in_use(vaulted), BACK_SECONDS_MAX, "the vault is in use again")


def test_its_password_is_in_a_file_alone(vaulted: Stack) -> None:
    password = Path(vaulted.env["VAULT_PASSWORD_FILE"]).read_text()
    services = (*SERVICES, "vault")
    assert password not in podman("inspect", *(vaulted.container(service) for service in services))
