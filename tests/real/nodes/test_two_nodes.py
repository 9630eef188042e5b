"""Two nodes with real vLLM on the CPU, in network namespaces: one fleet, whatever happens to the other node."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.real.fleet import until
from tests.real.nodes.hosts import Host, ip, prompt, running_hosts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
BACK_SECONDS_MAX = 60.0
ALONE_SECONDS_MAX = 30.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with running_hosts(2) as found:
        yield found


@pytest.fixture(autouse=True)
def together(hosts: list[Host]) -> None:
    """Each test begins with two nodes that hear each other."""
    for host in hosts:
        until(lambda host=host: not host.trouble() and len(host.replicas()) == 2, BACK_SECONDS_MAX, f"{host.name} is back", 0.2)


def test_a_replica_imports_from_another_node_and_answers_as_if_it_had_computed(hosts: list[Host]) -> None:
    a, b = hosts
    text = prompt("one", 60)
    computed = a.ask(text, "replica-0")
    imported = b.ask(text, "replica-0")
    assert computed.tokens("computed") > 400
    assert (imported.replica, imported.cache["source"]) == ("replica-0", "node-a:replica-0")
    assert imported.tokens("peer") > 400
    assert imported.text == computed.text


def test_a_gateway_steers_over_the_replicas_of_both_nodes(hosts: list[Host]) -> None:
    a, b = hosts
    text = prompt("two", 60)
    b.ask(text, "replica-0")
    until(lambda: a.ask(text).tokens("computed") < 100, 20, "node-a's gateway to know what node-b holds")
    led = a.ask(prompt("three", 60), "node-b:replica-0")
    assert led.replica == "node-b:replica-0"
    assert led.tokens("computed") > 400  # the delivery came with the first token


def test_an_import_into_another_nodes_replica_is_told_in_that_nodes_names(hosts: list[Host]) -> None:
    a, b = hosts
    text = prompt("four", 60)
    a.ask(text, "replica-0")
    led = a.ask(text, "node-b:replica-0")
    assert (led.replica, led.cache.get("source")) == ("node-b:replica-0", "replica-0")
    assert led.tokens("peer") > 400
    assert b.ask(text, "replica-0").tokens("local") > 400


def test_a_stopped_engine_on_the_other_node_still_gives_what_it_holds(hosts: list[Host]) -> None:
    a, b = hosts
    text = prompt("five", 60)
    a.ask(text, "replica-0")
    time.sleep(0.5)
    stopped = a.engine_pid()
    os.kill(stopped, signal.SIGSTOP)
    try:
        imported = b.ask(text, "replica-0")
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert imported.tokens("peer") > 400


def test_figures_and_doctor_tell_of_both_nodes(hosts: list[Host]) -> None:
    a, _ = hosts
    found = {replica["name"]: replica for replica in a.get("/kv/stats")["replicas"]}
    assert found.keys() == {"replica-0", "node-b:replica-0"}
    assert found["node-b:replica-0"]["blocks"]
    told = a.doctor()
    assert "node-b   10.79.0.2:7710, 1 of 1 replicas ready, blocks come by TCP" in told


def test_what_came_from_the_other_node_is_counted(hosts: list[Host]) -> None:
    a, b = hosts
    text = prompt("counted", 60)
    a.ask(text, "replica-0")
    time.sleep(1)  # for node-b to hear of it
    before = fetched(b)
    assert b.ask(text, "replica-0").tokens("peer") > 0
    until(lambda: fetched(b)["fetches"] > before["fetches"], 10, "the counts", 0.2)
    after = fetched(b)
    assert after["fetched_blocks"] > before["fetched_blocks"]
    assert after["fetched_bytes"] > before["fetched_bytes"]
    assert after["fetch_seconds"] > before["fetch_seconds"]
    assert f"{after['fetched_blocks']} blocks of it came" in b.doctor()


def fetched(host: Host) -> dict[str, Any]:
    """What a host counts of the other node."""
    (node,) = host.get("/kv/stats")["nodes"]
    return dict(node)


def test_an_agent_that_is_stopped_holds_up_one_import_and_is_replaced(hosts: list[Host]) -> None:
    a, b = hosts
    texts = [prompt(f"stopped {number}", 60) for number in range(3)]
    wanted = [a.ask(text, "replica-0") for text in texts]
    time.sleep(0.5)  # for node-b to hear of them
    former = b.agent_pid()
    os.kill(former, signal.SIGSTOP)
    answered = [b.ask(text, "replica-0") for text in texts]
    assert [each.ids for each in answered] == [each.ids for each in wanted]
    assert answered[0].tokens("peer") == 0
    cold = max(each.seconds for each in wanted)
    assert max(each.seconds for each in answered) < cold + 10  # an agent that is waited for costs 20
    until(lambda: b.agent_pid() not in (0, former), BACK_SECONDS_MAX, "another agent", 0.2)
    until(lambda: len(a.replicas()) == len(b.replicas()) == 2, BACK_SECONDS_MAX, "both again", 0.2)


def test_a_flush_at_one_node_empties_the_other_too(hosts: list[Host]) -> None:
    a, b = hosts
    text = prompt("flushed", 60)
    b.ask(text, "replica-0")
    answer = a.flush()
    assert set(answer["flushed"]) == {"replica-0", "node-b:replica-0"}
    assert (answer["failed"], answer["disks_left"]) == ({}, ["node-b"])
    assert b.ask(text, "replica-0").tokens("computed") > 100


def test_a_node_that_is_cut_off_is_left_alone_and_comes_back(hosts: list[Host]) -> None:
    a, b = hosts
    text = prompt("six", 60)
    a.ask(text, "replica-0")
    ip("-n", a.space, "link", "set", a.cable, "down")
    try:
        alone = b.ask(text)  # at once: the cut may not have been noticed
        until(lambda: b.replicas() == {"replica-0"}, ALONE_SECONDS_MAX, "node-b alone", 0.2)
        assert b.ask(prompt("seven", 20)).replica == "replica-0"
        assert a.ask(prompt("eight", 20)).replica == "replica-0"  # neither is wrong: both serve what they have
    finally:
        ip("-n", a.space, "link", "set", a.cable, "up")
    assert alone.text == a.ask(text, "replica-0").text
    until(lambda: len(b.replicas()) == 2, BACK_SECONDS_MAX, "both again", 0.2)


def test_an_agent_that_is_killed_is_started_again(hosts: list[Host]) -> None:
    a, b = hosts
    former = b.agent_pid()
    assert former
    os.kill(former, signal.SIGKILL)
    assert b.ask(prompt("nine", 20)).replica in {"replica-0", "node-a:replica-0"}
    until(lambda: b.agent_pid() not in (0, former), BACK_SECONDS_MAX, "another agent", 0.2)
    until(lambda: not a.trouble() and not b.trouble(), BACK_SECONDS_MAX, "the agent to be heard", 0.2)
    until(lambda: len(a.replicas()) == 2 and len(b.replicas()) == 2, BACK_SECONDS_MAX, "both again", 0.2)
    text = prompt("ten", 60)
    a.ask(text, "replica-0")
    until(lambda: b.ask(text, "replica-0").tokens("computed") < 100, 20, "what node-a holds", 0.2)
