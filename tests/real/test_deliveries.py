"""What a real engine tells of the requests it served, and what it keeps when it is asked to."""

import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest

from tests.real.fleet import Answer, Fleet, until
from transport.keys import chain_keys, root_key
from transport.table.deliveries import Delivery, DeliveryReason, EngineLoad
from transport.table.reader import TableReader

BLOCK = 32
PROMPT = 330
FULL = PROMPT // BLOCK * BLOCK
PIN = {"id": 5, "seconds": 3600.0}
CHURN_TOKENS = 640
CHURN_PROMPTS_MAX = 60
FORGET_SECONDS_MAX = 30.0


@dataclass
class Engine:
    """A replica, asked past the gateway and with hints of our own, and its table."""

    fleet: Fleet
    name: str
    table: TableReader

    def ask(self, prompt: list[int], max_tokens: int = 2, **hint: Any) -> Answer:
        params = {"peerkv": {"source": ""} | hint}
        return self.fleet.direct(self.name, prompt, max_tokens=max_tokens, kv_transfer_params=params)

    def delivered(self, prompt: list[int], **hint: Any) -> Delivery:
        """Ask, and return the record that tells of it."""
        tag = random.getrandbits(63)
        before, _ = self.table.deliveries(0)
        self.ask(prompt, tag=tag, **hint)
        (found,) = (each for each in self.table.deliveries(before)[1] if each.tag == tag)
        return found


@pytest.fixture
def one(fleet) -> Iterator[Engine]:
    with closing(fleet.table("replica-1")) as table:
        fleet.forget("replica-1")
        yield Engine(fleet, "replica-1", table)


@pytest.fixture
def zero(fleet) -> Iterator[Engine]:
    with closing(fleet.table("replica-0")) as table:
        yield Engine(fleet, "replica-0", table)


def parts(found: Delivery) -> tuple[int, int, int]:
    return found.local_tokens, found.peer_tokens, found.computed_tokens


def in_order(*times: int) -> bool:
    return all(times) and list(times) == sorted(times)


def test_cold_and_local_requests_are_told_apart(one, words):
    prompt = words.ids(PROMPT)
    cold, local = one.delivered(prompt), one.delivered(prompt)
    assert (parts(cold), cold.why) == ((0, 0, PROMPT), DeliveryReason.NO_SOURCE_GIVEN)
    assert (parts(local), local.why) == ((FULL, 0, PROMPT - FULL), DeliveryReason.NONE)
    for found in (cold, local):
        assert in_order(found.arrived_ns, found.asked_ns, found.scheduled_ns, found.first_token_ns)
        assert (found.prompt_tokens, found.source, found.import_bytes) == (PROMPT, "", 0)
    assert local.first_token_ns - local.scheduled_ns < cold.first_token_ns - cold.scheduled_ns


def test_an_import_is_told_with_its_source_and_its_cost(zero, one, words):
    prompt = words.ids(PROMPT)
    zero.ask(prompt)
    counted = {peer.name: peer for peer in one.table.peers()}.get("replica-0")
    found = one.delivered(prompt, source="replica-0")
    assert (parts(found), found.why) == ((0, FULL, PROMPT - FULL), DeliveryReason.NONE)
    assert (found.source, found.planned_tokens, found.stale_blocks, found.failed_blocks) == ("replica-0", FULL, 0, 0)
    assert found.import_bytes > 0
    assert 0 < found.import_ns <= found.import_wait_ns < found.scheduled_ns - found.asked_ns
    after = {peer.name: peer for peer in one.table.peers()}["replica-0"]
    blocks, size = (counted.blocks, counted.bytes) if counted else (0, 0)
    assert (after.blocks - blocks, after.bytes - size) == (FULL // BLOCK, found.import_bytes)
    assert after.transport == "shared_memory"


def test_a_split_imports_the_first_part_and_computes_the_rest(zero, one, words):
    prompt = words.ids(PROMPT)
    cold = zero.ask(prompt, max_tokens=12)
    found = one.delivered(prompt, source="replica-0", tokens=5 * BLOCK + 3)
    assert (parts(found), found.why) == ((0, 5 * BLOCK, PROMPT - 5 * BLOCK), DeliveryReason.LIMITED)
    assert one.ask(prompt, max_tokens=12).close_to(cold)


def test_a_source_that_is_gone_or_held_nothing_is_told(one, words):
    assert one.delivered(words.ids(PROMPT), source="replica-9").why is DeliveryReason.SOURCE_GONE
    assert one.delivered(words.ids(PROMPT), source="replica-0").why is DeliveryReason.SOURCE_HELD_LESS


def test_an_idle_engine_has_nothing_to_do_and_a_decoding_one_says_so(fleet, one, words):
    with fleet.decoding([words.text(40) for _ in range(2)], "replica-1"):
        decodes = EngineLoad(running_requests=2, decoding_requests=2)
        until(lambda: one.table.load() == decodes, FORGET_SECONDS_MAX, "it says that it decodes two")
    until(lambda: one.table.load() == EngineLoad(), FORGET_SECONDS_MAX, "the engine forgot its requests")


def churn(engine: Engine, words: Any, gone: list[int]) -> None:
    """Use the cache until nothing is left of a prompt."""
    for _ in range(CHURN_PROMPTS_MAX):
        if not holds(engine, gone):
            return
        engine.ask(words.ids(CHURN_TOKENS), max_tokens=1)
    raise AssertionError(f"{CHURN_PROMPTS_MAX} prompts did not use up the cache")


def holds(engine: Engine, prompt: list[int]) -> bool:
    """Whether the engine offers the first block of a prompt."""
    keys = chain_keys(root_key(engine.table.fingerprint, hash_name=engine.table.hash_name), prompt[:BLOCK], BLOCK)
    return len(engine.table.longest_run(keys)) == 1


def test_a_pinned_prefix_outlives_what_evicts_another_and_ends_when_it_is_unpinned(one, words):
    pinned, other = words.ids(PROMPT), words.ids(PROMPT)
    one.ask(pinned, pin=PIN)
    one.ask(other)
    assert one.table.load().pinned_blocks == FULL // BLOCK
    churn(one, words, other)
    assert holds(one, pinned)
    assert parts(one.delivered(pinned)) == (FULL, 0, PROMPT - FULL)
    one.ask(other, unpin=[PIN["id"]])
    assert one.table.load().pinned_blocks == 0
    churn(one, words, pinned)
    assert parts(one.delivered(pinned)) == (0, 0, PROMPT)


def test_a_pin_ends_by_itself(one, words):
    pins = one.table.counters()["pins"]
    one.ask(words.ids(PROMPT), pin={"id": 6, "seconds": 0.2})
    assert one.table.counters()["pins"] == pins + 1
    until(lambda: bool(one.ask(words.ids(8))) and one.table.load().pinned_blocks == 0, 30.0, "the pin ended")


def test_a_flush_succeeds_though_there_are_pins_and_ends_them(fleet, one, words):
    prompt = words.ids(PROMPT)
    one.ask(prompt, pin=PIN)
    assert one.table.load().pinned_blocks > 0
    until(lambda: one.table.load().running_requests == 0, FORGET_SECONDS_MAX, "nothing runs")
    fleet.flush()
    assert one.table.load().pinned_blocks == 0
    assert not holds(one, prompt)
    assert parts(one.delivered(prompt)) == (0, 0, PROMPT)
