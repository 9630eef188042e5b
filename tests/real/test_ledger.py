"""Each reason why a prompt was not cached, provoked on real replicas, as the ledger, the header and the figures tell it."""

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest

from engine.fleet import FileFleet, write_fleet
from tests.real.conftest import ONE, TWO
from tests.real.faults.gateways import another_gateway
from tests.real.faults.test_changed_blocks import one_core_for, withdraw_when_opened
from tests.real.fleet import ROOT, until
from tests.real.owner import OwnMemory, held, keys_of, table_like
from transport.table.reader import SUFFIX

BLOCK = 32
LENGTH = 400
WHOLE = (LENGTH - 1) // BLOCK * BLOCK
LONG = 1500
ATTEMPTS_MAX = 30
SETTLE_SECONDS = 15.0
OTHER_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


@dataclass
class Told:
    """A request, as the header of its answer and the ledger tell of it."""

    header: dict[str, str]
    attempt: dict[str, Any]

    @property
    def delivered(self) -> tuple[int, int, int]:
        """Local, peer and computed tokens by the ledger; the header must say the same."""
        (record,) = self.attempt["delivered"]
        found = tuple(record[f"{where}_tokens"] for where in ("local", "peer", "computed"))
        assert tuple(int(self.header[where]) for where in ("local", "peer", "computed")) == found
        return found

    @property
    def loss(self) -> tuple[str, int]:
        return self.attempt["reason"], self.attempt["lost_tokens"]


def parse(header: str) -> dict[str, str]:
    """A dictionary of structured fields whose members are tokens, integers and strings."""
    return {name: value.strip('"') for name, value in (member.split("=", 1) for member in header.split(", "))}


def explained(client: httpx.Client, request_id: str) -> dict[str, Any]:
    """The last attempt under that id, once it is settled."""
    attempts: list[dict[str, Any]] = []

    def settled() -> bool:
        attempts[:] = client.get(f"/kv/explain/{request_id}").raise_for_status().json()["attempts"]
        return attempts[-1]["settled"]

    until(settled, SETTLE_SECONDS, "the ledger has settled the request")
    return attempts[-1]


def ask(fleet, prompt, *, replica: str | None = None, key: str = "", client: httpx.Client | None = None, **more: Any) -> Told:
    """A greedy completion, or with `messages` a chat, streamed or not, and what is told of it."""
    client = client or fleet.client
    request_id = f"ledger-{uuid.uuid4().hex}"
    headers = fleet.headers(key) | {"x-request-id": request_id} | ({"x-peerkv-replica": replica} if replica else {})
    path = "/v1/chat/completions" if "messages" in more else "/v1/completions"
    body = fleet.body(prompt, **more)
    if "messages" in more:
        body = {name: value for name, value in body.items() if name not in ("prompt", "logprobs", "return_tokens_as_token_ids")}
    answer = client.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return Told(parse(answer.headers["x-peerkv-cache"]), explained(client, request_id))


def test_a_new_prompt_is_cold_and_the_same_one_again_loses_nothing(fleet, words):
    ids = words.ids(LENGTH)
    first, second = ask(fleet, ids), ask(fleet, ids)
    assert (first.delivered, first.loss, first.header["reason"]) == ((0, 0, LENGTH), ("cold", 0), "cold")
    assert (second.delivered, second.loss) == ((WHOLE, 0, LENGTH - WHOLE), ("none", 0))
    assert second.attempt["expected"]["local_tokens"] == WHOLE
    assert second.attempt["replica"] == first.attempt["replica"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_pull_is_told_by_the_header_and_explained(fleet, words, stream):
    ids = words.ids(LENGTH)
    ask(fleet, ids, replica="replica-0")
    told = ask(fleet, ids, replica="replica-1", stream=stream)
    assert told.header == {
        "local": "0", "peer": str(WHOLE), "computed": str(LENGTH - WHOLE), "source": "replica-0", "reason": "none"
    }  # fmt: skip
    assert told.loss == ("none", 0)
    attempt, (record,) = told.attempt, told.attempt["delivered"]
    assert (attempt["action"], attempt["source"], attempt["tenant"]) == ("pull", "replica-0", ONE.name)
    assert attempt["expected"]["peer_tokens"] == attempt["expected"]["best_available_tokens"] == WHOLE
    assert record["import_bytes"] > 0
    assert 0 < record["import_seconds"] <= record["import_wait_seconds"] <= record["first_token_seconds"]
    assert record["first_token_seconds"] < attempt["first_byte_seconds"] + 0.05
    peers = {peer["name"]: peer for peer in fleet.replica_stats("replica-1")["peers"]}
    assert peers["replica-0"]["imports"] > 0
    assert peers["replica-0"]["gigabytes_per_second"] > 0
    metrics = fleet.client.get("/metrics").text
    assert 'peerkv_peer_import_bytes_total{peer="replica-0",replica="replica-1",transport="shared_memory"}' in metrics
    assert 'peerkv_import_wait_seconds_count{peer="replica-0",replica="replica-1",transport="shared_memory"}' in metrics


def test_the_header_of_a_streamed_chat_is_there_with_its_role_event(fleet, words):
    messages = [{"role": "user", "content": words.text(LENGTH)}]
    ask(fleet, None, messages=messages, stream=True, replica="replica-0")
    told = ask(fleet, None, messages=messages, stream=True, replica="replica-1")
    local, peer, _ = told.delivered
    assert local == 0
    assert peer >= WHOLE
    assert told.loss == ("none", 0)
    assert told.attempt["endpoint"] == "chat"


def test_what_a_flush_took_away_was_flushed(fleet, words):
    ids = words.ids(LENGTH)
    ask(fleet, ids)
    fleet.flush()
    told = ask(fleet, ids)
    reason, lost = told.loss
    assert (told.delivered, reason) == ((0, 0, LENGTH), "flushed")
    assert 0.75 * WHOLE <= lost <= WHOLE


def test_another_tenants_prompt_is_cold(fleet, words):
    ids = words.ids(LENGTH)
    ask(fleet, ids)
    told = ask(fleet, ids, key=TWO.api_key.get_secret_value())
    assert (told.delivered, told.loss) == ((0, 0, LENGTH), ("cold", 0))
    assert told.header["reason"] == "cold"


def test_a_source_that_lost_its_blocks_meanwhile_is_stale(fleet, words):
    """replica-1 sleeps while the request is planned and sent, and replica-0's cache is emptied."""
    ids = words.ids(LENGTH)
    ask(fleet, ids, replica="replica-0")
    with closing(fleet.table("replica-1")) as table:
        pid = table.description.pid
    found: list[Told] = []
    thread = threading.Thread(target=lambda: found.append(ask(fleet, ids, replica="replica-1")))
    os.kill(pid, signal.SIGSTOP)
    try:
        thread.start()
        until(lambda: fleet.replica_stats("replica-1")["in_flight"] == 1, SETTLE_SECONDS, "the request is sent")
        fleet.forget("replica-0")
    finally:
        os.kill(pid, signal.SIGCONT)
        thread.join()
    (told,) = found
    assert told.attempt["action"] == "pull"
    assert told.delivered == (0, 0, LENGTH)
    assert told.loss == ("stale", WHOLE)
    assert told.header["reason"] == "stale"


@contextmanager
def stand_in(fleet, ids: list[int], salt: str) -> Iterator[tuple]:
    """A table of our own in the place of replica-0's, with all blocks of a prompt that it holds."""
    path = fleet.table_dir / f"replica-0{SUFFIX}"
    aside = fleet.table_dir / ".replica-0.aside"
    with closing(fleet.table("replica-0")) as like:
        memory = OwnMemory(like, held(like, ids, salt))
        os.rename(path, aside)
        try:
            with table_like(fleet.table_dir, "replica-0", like, blocks=memory.blocks, memories=(memory.memory,)) as table:
                table.publish(range(memory.blocks), keys_of(like, ids, salt))
                yield table, memory
        finally:
            os.rename(aside, path)
            memory.close()


def test_blocks_that_change_under_the_copy_fail_the_check(fleet, words, salt):
    ids = words.ids(LONG)
    ask(fleet, ids, replica="replica-0")
    for _ in range(ATTEMPTS_MAX):
        fleet.forget("replica-1")
        stop, tell = os.pipe()
        with stand_in(fleet, ids, salt) as (table, memory):
            watch = memory.watch()
            thread = threading.Thread(target=withdraw_when_opened, args=(table, memory, watch, stop))
            thread.start()
            try:
                with one_core_for(fleet, "replica-1"):
                    told = ask(fleet, ids, replica="replica-1")
            finally:
                os.close(tell)
                thread.join()
                os.close(watch)
                os.close(stop)
        reason, lost = told.loss
        _, peer, _ = told.delivered
        if told.attempt["action"] != "pull":  # withdrawn before the gateway looked
            continue
        assert (reason == "check_failed") == (told.attempt["delivered"][0]["failed_blocks"] > 0)
        if reason == "check_failed":
            assert told.attempt["delivered"][0]["stale_blocks"] > 0
            assert lost == (LONG - 1) // BLOCK * BLOCK - peer
            assert told.header["reason"] == "check_failed"
            return
    raise AssertionError(f"none of {ATTEMPTS_MAX} imports was caught by a change")


def test_token_ids_that_are_not_the_engines_are_a_parity_loss(fleet, words, tmp_path):
    messages = [{"role": "user", "content": words.text(LENGTH)}]
    template = tmp_path / "other.jinja"
    template.write_text(OTHER_TEMPLATE)
    told_wrong = replace(FileFleet(fleet.run_dir).snapshot(), vllm_args=("--chat-template", str(template)))
    write_fleet(tmp_path, told_wrong)
    with another_gateway(fleet, tmp_path, "", run_dir=tmp_path) as other:
        told = ask(fleet, None, messages=messages, client=other.client)
        stats = other.stats()
    reason, lost = told.loss
    assert (reason, told.header["reason"]) == ("parity", "parity")
    assert lost >= WHOLE
    assert (stats["parity"]["chat"]["parity"], stats["parity"]["completions"]["parity"]) == ("off", "exact")
    assert stats["ledger"]["requests"]["parity"] == 1


def test_every_reason_adds_up_in_the_figures_and_the_command_explains(fleet, words):
    request_id = f"ledger-{uuid.uuid4().hex}"
    headers = fleet.headers() | {"x-request-id": request_id}
    fleet.client.post("/v1/completions", json=fleet.body(words.ids(LENGTH)), headers=headers).raise_for_status()
    ledger = fleet.stats()["ledger"]
    assert sum(ledger["requests"].values()) == ledger["settled"] > 0
    assert ledger["requests"]["cold"] > 0
    command = [sys.executable, "-m", "gateway.cli", "kv", "explain", request_id, "--url", fleet.url]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PEERKV_")}
    run = subprocess.run(
        [*command, "--json"],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(run.stdout)["attempts"][0]["reason"] == "cold"


def test_an_unknown_request_is_not_found(fleet):
    answer = fleet.client.get("/kv/explain/nobody-sent-this")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "request_not_found")


def test_a_kept_prefix_is_pinned_on_both_replicas_used_there_and_let_go(fleet, words):
    ids = words.ids(LENGTH)
    wanted = {"ids": ids, "tenant": ONE.name, "replicas": 2, "ttl": 600}
    answer = fleet.client.post("/kv/prefixes", json=wanted)
    assert answer.status_code == 201, answer.text
    kept = answer.json()
    try:
        first, second = kept["places"]
        assert (first["state"], first["computed_tokens"]) == ("pinned", LENGTH)
        assert (second["state"], second["peer_tokens"], second["source"]) == ("pinned", WHOLE, first["replica"])
        assert fleet.client.get("/kv/prefixes").json()["kept"] == [kept]
        for name in ("replica-0", "replica-1"):
            assert fleet.replica_stats(name)["load"]["pinned_blocks"] == LENGTH // BLOCK
            told = ask(fleet, [*ids, *words.ids(8)], replica=name)
            assert told.attempt["delivered"][0]["local_tokens"] >= WHOLE
    finally:
        gone = fleet.client.delete(f"/kv/prefixes/{kept['id']}").json()
    assert sorted(gone["unpinned"]) == ["replica-0", "replica-1"]
    assert [fleet.replica_stats(name)["load"]["pinned_blocks"] for name in ("replica-0", "replica-1")] == [0, 0]
    assert fleet.client.get("/kv/prefixes").json()["kept"] == []
