"""The compose file runs: what it serves, what it lets nobody do, and how it comes back from all that ends a container."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.containers.stack import (
    BACK_SECONDS_MAX,
    MODEL,
    PROJECT,
    SERVICES,
    START_SECONDS_MAX,
    Stack,
    long_prompt,
    podman,
    run,
    until,
)

STOP_SECONDS_MAX = 60  # compose.yaml's stop_grace_period


def answers(stack: Stack) -> bool:
    """Whether a prompt is answered now."""
    stack.wait_ready()
    return stack.complete("The capital of France is").status_code == 200


def test_completions_and_chats_are_answered_at_the_published_address(stack: Stack) -> None:
    assert [model["id"] for model in stack.client.get("/v1/models").json()["data"]] == [MODEL]  # from the TOML file
    answer = stack.complete("The capital of France is")
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 8}
    chat = stack.client.post("/v1/chat/completions", json=body)
    assert chat.json()["choices"][0]["message"]["content"]


def test_the_gateway_is_published_at_the_chosen_address_alone(stack: Stack) -> None:
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{stack.port}/health")


def test_one_replica_imports_what_the_other_computed(stack: Stack) -> None:
    before = stack.stats()["totals"]
    prompt = long_prompt()
    assert stack.complete(prompt, "replica-0").status_code == 200
    imported = stack.complete(prompt, "replica-1")
    assert imported.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 1000
    after = stack.stats()["totals"]
    assert after["counts"]["imports"] == before["counts"]["imports"] + 1
    assert after["counts"]["check_failures"] == 0
    assert after["tokens"]["peer_shared_memory"] > before["tokens"]["peer_shared_memory"] + 1000


@pytest.mark.parametrize("path", ["/kv/stats", "/metrics"])
def test_figures_need_the_admin_key_that_came_as_a_file(stack: Stack, path: str) -> None:
    assert stack.client.get(path).status_code == 401
    assert stack.client.get(path, headers=stack.admin).status_code == 200
    assert stack.key not in podman("inspect", *(stack.container(service) for service in SERVICES))


def test_a_setting_of_the_environment_reaches_the_gateway(stack: Stack) -> None:
    stack.client.get("/health")
    until(lambda: "GET /health" in stack.logs("gateway"), 10, "PEERKV_ACCESS_LOG shows requests")


@pytest.mark.parametrize("service", ["gateway", "engine-cpu"])
def test_the_doctor_finds_no_problem_in_either_container(stack: Stack, service: str) -> None:
    said = stack.execute(service, "peerkv", "doctor", check=False)
    assert "No problem found." in said.stdout, said.stdout + said.stderr
    assert "replica-1" in said.stdout


def test_the_doctor_finds_a_gateway_that_does_not_see_the_block_tables(stack: Stack) -> None:
    """As where the tables are in the engine's /dev/shm, which no other container has."""
    flags = (
        "--volume",
        f"{PROJECT}_run:/run/peerkv",
        "--tmpfs",
        "/run/peerkv/tables",
        "--env",
        "PEERKV_RUN_DIR=/run/peerkv/main",
    )
    said = run("podman", "run", "--rm", *flags, "peerkv-gateway:0.1.0", "doctor", check=False)
    assert said.returncode == 1
    assert "replica-1 shares no KV: it has no block table in /run/peerkv/tables" in said.stdout, said.stdout + said.stderr
    assert "/dev/shm is each container's own" in said.stdout


@pytest.mark.parametrize("service", ["gateway", "engine-cpu"])
def test_a_container_is_healthy_has_no_root_and_a_file_system_that_nobody_writes_to(stack: Stack, service: str) -> None:
    kind = service.partition("-")[0]
    assert stack.execute(service, "python", "/opt/peerkv/healthcheck.py", kind).stdout.strip() == "ok"
    assert stack.execute(service, "id", "-u").stdout.strip() == "10001"
    assert stack.execute(service, "touch", "/opt/peerkv/x", check=False).returncode != 0
    assert stack.execute(service, "touch", "/home/peerkv/x", check=False).returncode != 0
    assert "CapEff:\t0000000000000000" in stack.execute(service, "cat", "/proc/1/status").stdout


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_that_is_killed_comes_back_and_the_others_stay(stack: Stack, service: str) -> None:
    before = {name: stack.inspect(name) for name in SERVICES}
    os.kill(before[service]["State"]["Pid"], signal.SIGKILL)
    until(
        lambda: stack.inspect(service)["State"]["Pid"] not in (0, before[service]["State"]["Pid"]),
        BACK_SECONDS_MAX,
        "restarted",
    )
    assert answers(stack)
    for name in set(SERVICES) - {service}:
        assert stack.inspect(name)["State"]["Pid"] == before[name]["State"]["Pid"]
    until(lambda: stack.query('up{job="peerkv"} == 1'), BACK_SECONDS_MAX, "Prometheus reads the gateway again")


def test_a_running_stream_ends_well_before_a_stop_does(stack: Stack) -> None:
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 200, "stream": True, "ignore_eos": True}
    with stack.client.stream("POST", "/v1/completions", json=body) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        began = time.monotonic()
        stop = threading.Thread(target=stack.down)
        stop.start()
        last = list(lines)[-1]
    stop.join()
    assert last == "data: [DONE]"
    assert time.monotonic() - began < STOP_SECONDS_MAX


def test_after_down_and_up_the_model_is_still_there(stack: Stack) -> None:
    stack.up()
    stack.wait_ready(BACK_SECONDS_MAX)
    assert answers(stack)
    assert "fetch" not in stack.logs("engine-cpu").lower()


def test_containers_that_are_started_in_any_order_find_each_other(stack: Stack) -> None:
    """As after a reboot: all end at once, what was in memory is gone, and nobody keeps depends_on's order."""
    # Podman does not wait long enough for one with much memory, and says so; so the end is waited for below.
    podman("kill", *(stack.container(service) for service in SERVICES), check=False)
    for service in SERVICES:
        until(lambda name=service: not stack.inspect(name)["State"]["Running"], STOP_SECONDS_MAX, f"{service} ended")
    for service in ("gateway", "prometheus", "engine-cpu"):
        podman("start", stack.container(service))
    stack.wait_ready(BACK_SECONDS_MAX)
    assert answers(stack)


def test_shared_memory_that_is_too_small_is_said_and_nothing_serves(clone: Path, tmp_path: Path, stack: Stack) -> None:
    stack.down()
    small = Stack(clone, tmp_path, profiles=("cpu",))
    small.env["SHM_SIZE"] = "64mb"
    try:
        small.up("engine-cpu")
        until(
            lambda: "the KV of 2 replicas takes 1024" in small.logs("engine-cpu"),
            START_SECONDS_MAX,
            "the engine says that /dev/shm is too small",
        )
        assert small.execute("engine-cpu", "python", "/opt/peerkv/healthcheck.py", "engine", check=False).returncode != 0
    finally:
        small.down()
