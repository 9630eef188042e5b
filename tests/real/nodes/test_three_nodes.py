"""Three nodes with real vLLM on the CPU, in network namespaces: one fleet, the clocks of one an hour ahead of the others'."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.real.fleet import until
from tests.real.nodes.hosts import TRUE, Answered, Clocks, Host, ip, prompt, running_hosts, together
from tests.real.nodes.tiny import tiny_served

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
HOUR = 3600
ITEMS = 60
KNOWN_SECONDS_MAX = 20.0
BACK_SECONDS_MAX = 60.0
HEARD_SECONDS = 2.0
"""Changes are told twenty times a second; a busy machine has time to spare."""
TRIES_MAX = 5


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    served = tiny_served(tmp_path_factory.mktemp("tiny"))
    with running_hosts(3, served=served, clocks=(TRUE, TRUE, Clocks(monotonic=HOUR, wall=HOUR))) as found:
        yield found


def shared(owner: Host, taker: Host, name: str) -> tuple[str, Answered]:
    """Have a fresh prompt computed and taken over: its text, and the answer. Where computing is thought sooner, another."""
    for _ in range(TRIES_MAX):
        text = prompt(name, ITEMS)
        computed = owner.ask(text, "replica-0")
        assert computed.tokens("computed") > 400
        time.sleep(HEARD_SECONDS)
        imported = taker.ask(text, "replica-0")
        assert imported.ids == computed.ids
        if imported.cache.get("reason") != "load":
            assert imported.cache.get("source") == f"{owner.name}:replica-0", imported.cache
            return text, imported
    raise AssertionError(f"{TRIES_MAX} prompts of {owner.name} were computed by {taker.name}: {imported.cache}{taker.logs()}")


def test_what_one_node_computed_the_two_others_import_bit_equal_to_a_local_hit(hosts: list[Host]) -> None:
    for owner in hosts:  # the one whose clocks are ahead too
        for taker in [host for host in hosts if host is not owner]:
            text, imported = shared(owner, taker, f"of {owner.name}")
            local = taker.ask(text, "replica-0")
            assert imported.tokens("peer") == local.tokens("local") > 400
            assert (imported.ids, imported.logprobs) == (local.ids, local.logprobs)


def test_the_ledger_explains_an_import_from_another_node_and_the_counters_have_it(hosts: list[Host]) -> None:
    owner, taker, _ = hosts
    source = f"{owner.name}:replica-0"
    before = imported_tokens(taker)
    _, imported = shared(owner, taker, "explained")
    (attempt,) = taker.get(f"/kv/explain/{imported.request_id}")["attempts"]
    assert (attempt["replica"], attempt["source"]) == ("replica-0", source)
    assert attempt["expected"]["peer_tokens"] == imported.tokens("peer")
    (delivered,) = attempt["delivered"]
    assert (delivered["source"], delivered["peer_tokens"]) == (source, imported.tokens("peer"))
    assert delivered["import_bytes"] > 0
    until(lambda: imported_tokens(taker) >= before + imported.tokens("peer"), KNOWN_SECONDS_MAX, "the counters")


def imported_tokens(host: Host) -> int:
    (own,) = [replica for replica in host.get("/kv/stats")["replicas"] if replica["name"] == "replica-0"]
    return int(own["tokens"]["peer_shared_memory"])


def test_a_prefix_is_pinned_on_the_replicas_of_all_nodes(hosts: list[Host]) -> None:
    a, b, _ = hosts
    text = prompt("pinned", ITEMS)
    kept = a.keep(text, 3)
    names = {"replica-0", "node-b:replica-0", "node-c:replica-0"}
    assert {place["replica"] for place in kept["places"]} == names, kept
    until(
        lambda: {place["state"] for place in a.get("/kv/prefixes")["kept"][-1]["places"]} == {"pinned"},
        KNOWN_SECONDS_MAX,
        "the pins",
    )
    assert b.ask(text, "replica-0").tokens("local") > 400


def test_each_gateway_finds_what_any_of_the_three_holds(hosts: list[Host]) -> None:
    for owner in hosts:
        text = prompt(f"known of {owner.name}", ITEMS)
        answered = owner.ask(text, "replica-0")
        for host in hosts:
            until(partial(knows, host, text), KNOWN_SECONDS_MAX, f"what {owner.name} holds, at {host.name}")
            assert host.ask(text).ids == answered.ids


def knows(host: Host, text: str) -> bool:
    """Whether a host's gateway has a prompt answered without computing it."""
    return host.ask(text).tokens("computed") < 100


def test_requests_at_one_gateway_are_spread_over_all_three(hosts: list[Host]) -> None:
    a = hosts[0]
    for round_ in range(10):
        texts = [prompt(f"spread {round_} {number}", ITEMS) for number in range(9)]
        with ThreadPoolExecutor(len(texts)) as pool:
            answered = {answer.replica for answer in pool.map(a.ask, texts)}
        if answered == {"replica-0", "node-b:replica-0", "node-c:replica-0"}:
            return
    raise AssertionError(f"all requests of a round went to {answered}")


def test_two_nodes_go_on_sharing_while_the_third_is_cut_off(hosts: list[Host]) -> None:
    a, b, c = hosts
    text = prompt("of the one that goes", ITEMS)
    computed = c.ask(text, "replica-0")
    ip("-n", c.space, "link", "set", c.cable, "down")
    try:
        for host in (a, b):  # at once: the cut may not have been noticed
            assert host.ask(text, "replica-0").ids == computed.ids
        for host, other in ((a, b), (b, a)):
            left = {"replica-0", f"{other.name}:replica-0"}
            until(lambda host=host, left=left: host.replicas() == left, BACK_SECONDS_MAX, "node-c to be missed", 0.2)
        shared(a, b, "of the two that are left")
        assert c.ask(text).tokens("local") > 400
    finally:
        ip("-n", c.space, "link", "set", c.cable, "up")
    together(hosts, BACK_SECONDS_MAX)
