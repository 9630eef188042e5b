"""`peerkv replicas` against a gateway that answers from memory, with another node's replicas among its own."""

import argparse
import io
import json

import httpx
import pytest
from rich.console import Console

from gateway.cli.asking import run
from gateway.cli.replicas import add_commands
from gateway.replica_control.shapes import ControlledReplica, ReplicaList


def shape(name: str, node: str = "", reason: str = "ready", state: str = "ready") -> ControlledReplica:
    return ControlledReplica(name=name, node=node, state=state, reason=reason, device="cpu", restarts=0, requests=0)


THERE = ReplicaList(restartable=True, replicas=[shape("replica-0"), shape("replica-1"), shape("node-b:replica-0", "node-b")])


def replicas(*flags: str, there: ReplicaList = THERE) -> tuple[int, str, list[str]]:
    """Status, output, and what was asked for by POST."""
    posted: list[str] = []

    def reply(request: httpx.Request) -> httpx.Response:
        path = request.url.raw_path.decode()
        if request.method == "GET":
            return httpx.Response(200, content=there.model_dump_json())
        posted.append(path)
        if "replica-9" in path:
            message = "No other replica than replica-9 is ready, so that nobody could serve; force it, or wait for another one."
            return httpx.Response(409, json={"error": {"message": message, "type": "conflict"}})
        if "node-b" in path:
            message = "node-b:replica-0 is a replica of node-b"
            return httpx.Response(409, json={"error": {"message": message, "type": "invalid_request_error"}})
        return httpx.Response(202, content=shape(path.split("/")[2]).model_dump_json())

    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    console = Console(file=io.StringIO(), width=200, no_color=True)
    status = run(parser.parse_args(["replicas", *flags]), console, httpx.MockTransport(reply))
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue(), posted


def test_all_are_those_of_this_node_and_the_others_are_named() -> None:
    status, output, posted = replicas("restart", "--all")
    assert (status, posted) == (0, ["/replicas/replica-0/restart", "/replicas/replica-1/restart"])
    assert "this node alone: node-b:replica-0 are for a gateway of their node" in output
    assert "replica-1: ready again" in output


def test_as_json_nothing_but_json_is_printed() -> None:
    _, output, _ = replicas("restart", "--all", "--json")
    assert [json.loads(part + "}")["name"] for part in output.split("}\n") if part] == ["replica-0", "replica-1"]


def test_the_list_marks_another_nodes_replicas() -> None:
    _, output, _ = replicas("list")
    assert [line.split()[0] for line in output.splitlines() if "of node-b" in line] == ["node-b:replica-0"]


@pytest.mark.parametrize("command", ["drain", "resume", "restart"])
def test_another_nodes_replica_is_refused_with_the_gateways_words(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, posted = replicas(command, "node-b:replica-0")
    assert (status, posted) == (1, [f"/replicas/node-b%3Areplica-0/{command}"])
    assert "is a replica of node-b" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["drain", "restart"])
def test_the_last_replica_that_is_ready_takes_force_by_its_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert replicas(command, "replica-9")[0] == 1
    said = "No other replica than replica-9 is ready, so that nobody could serve; give --force, or wait for another one."
    assert capsys.readouterr().err == f"peerkv: {said}\n"


@pytest.mark.parametrize("command", ["drain", "restart"])
def test_force_is_passed_on(command: str) -> None:
    assert replicas(command, "replica-0", "--force")[2] == [f"/replicas/replica-0/{command}?force=true"]


def test_all_that_are_drained_on_this_node_are_resumed() -> None:
    drained = [shape(name, state="draining") for name in ("replica-1", "replica-2")]
    there = ReplicaList(
        restartable=True, replicas=[shape("replica-0"), *drained, shape("node-b:replica-0", "node-b", state="draining")]
    )
    status, output, posted = replicas("resume", "--all", there=there)
    assert (status, posted) == (0, ["/replicas/replica-1/resume", "/replicas/replica-2/resume"])
    assert "replica-2 is ready" in output


def test_where_none_is_drained_that_is_said() -> None:
    status, output, posted = replicas("resume", "--all")
    assert (status, posted) == (0, [])
    assert "no replica of this node is drained" in output
