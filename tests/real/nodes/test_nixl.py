"""Two nodes with real vLLM whose blocks come by NIXL, here over TCP between network namespaces: whatever becomes of NIXL."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from engine.host_process.processes import children
from tests.real.fleet import until
from tests.real.nodes.hosts import Host, prompt, running_hosts
from transport.node.nixl.ability import ability

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(
        not ability("nixl").version, reason="NIXL is not installed (CONTRIBUTING.md says how its tests are run)"
    ),
]
BACK_SECONDS_MAX = 60.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with mock.patch.dict(os.environ, {"UCX_TLS": "tcp,self"}), running_hosts(2, "--node-transport", "nixl") as found:
        yield found


@pytest.fixture(autouse=True)
def by_nixl(hosts: list[Host]) -> None:
    """Each test begins with two nodes whose blocks come by NIXL."""
    for host in hosts:
        until(lambda host=host: not host.trouble() and way(host) == "nixl", BACK_SECONDS_MAX, f"NIXL at {host.name}", 0.2)


def way(host: Host) -> str:
    """How the other node's blocks come."""
    stats = host.get("/kv/stats")
    return stats["nodes"][0]["transport"] if stats and stats["nodes"] else ""


def nixl_pids(host: Host, role: str) -> list[int]:
    """The agent's processes of a role, owner or reader."""
    found = children(host.agent_pid())
    return [pid for pid in found if f"nixl-{role}-".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]


def stop(pid: int) -> None:
    """Stop a process, all of its threads: the first to be scheduled tells the others."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    until(lambda: all(") T " in (task / "stat").read_text() for task in tasks.iterdir()), 10, "the stop", 0.01)


def test_a_replica_imports_by_nixl_and_answers_as_if_it_had_computed(hosts: list[Host]) -> None:
    a, b = hosts
    text = prompt("one", 60)
    computed, imported = a.ask(text, "replica-0"), b.ask(text, "replica-0")
    assert computed.tokens("computed") > 400
    assert (imported.cache["source"], imported.tokens("peer") > 400) == ("node-a:replica-0", True)
    assert imported.text == computed.text
    assert way(b) == "nixl"


def test_figures_and_doctor_tell_how_blocks_come(hosts: list[Host]) -> None:
    a, _ = hosts
    (node,) = a.get("/kv/stats")["nodes"]
    assert (node["name"], node["transport"], node["transport_reason"]) == ("node-b", "nixl", "node_transport is nixl")
    assert min(node["tcp_bytes_per_second"], node["nixl_bytes_per_second"]) > 0
    assert "1 of 1 replicas ready, blocks come by NIXL, unencrypted (node_transport is nixl; measured " in a.doctor()


def test_an_owners_process_that_is_killed_costs_one_import_at_most(hosts: list[Host]) -> None:
    a, b = hosts
    texts = [prompt(f"killed {number}", 60) for number in range(3)]
    for text in texts:
        a.ask(text, "replica-0")
    b.ask(texts[0], "replica-0")
    (pid,) = nixl_pids(a, "owner")
    os.kill(pid, signal.SIGKILL)
    first, second = (b.ask(text, "replica-0") for text in texts[1:])
    assert second.tokens("peer") > 400
    assert [first.text, second.text] == [a.ask(text, "replica-0").text for text in texts[1:]]


def test_a_node_whose_processes_are_stopped_is_computed_for_and_its_blocks_come_by_tcp(hosts: list[Host]) -> None:
    a, b = hosts
    texts = [prompt(f"stopped {number}", 60) for number in range(2)]
    for text in texts:
        a.ask(text, "replica-0")
    (pid,) = nixl_pids(a, "owner")
    stop(pid)
    try:
        late, by_tcp = (b.ask(text, "replica-0") for text in texts)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert late.tokens("computed") > 400
    assert by_tcp.tokens("peer") > 400
    assert [late.text, by_tcp.text] == [a.ask(text, "replica-0").text for text in texts]


def test_a_reading_process_that_is_stopped_is_ended_and_another_reads(hosts: list[Host]) -> None:
    a, b = hosts
    text = prompt("stuck", 60)
    computed = a.ask(text, "replica-0")
    (pid,) = nixl_pids(b, "reader")
    stop(pid)
    late = b.ask(text, "replica-0")
    assert late.text == computed.text
    until(lambda: nixl_pids(b, "reader") not in ([], [pid]), BACK_SECONDS_MAX, "another process", 0.2)
