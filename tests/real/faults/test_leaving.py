"""A client that leaves frees the engine."""

import socket
import time

import httpx
import pytest

from tests.real.fleet import ANSWER_SECONDS_MAX, until

CANCEL_SECONDS_MAX = 1.0


def running(fleet, replica: str) -> float:
    """Requests that the engine computes now, as it says itself."""
    with fleet.socket_client(replica) as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running{"))


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_a_client_that_leaves_ends_its_request_in_the_engine(fleet, words, endpoint, stream):
    body = {"model": fleet.model, "max_tokens": 7000, "ignore_eos": True, "stream": stream}
    text = words.text(30)
    body |= {"messages": [{"role": "user", "content": text}]} if "chat" in endpoint else {"prompt": text}
    pinned = fleet.headers() | {"x-peerkv-replica": "replica-0"}
    until(lambda: running(fleet, "replica-0") == 0, ANSWER_SECONDS_MAX, "the engine is idle")
    left = fleet.stats()["gateway"]["clients_left"]
    leave_while_it_is_computed(fleet, endpoint, body, pinned)
    gone = time.monotonic()
    until(lambda: running(fleet, "replica-0") == 0, ANSWER_SECONDS_MAX, "the engine dropped the request", poll_seconds=0.02)
    assert time.monotonic() - gone < CANCEL_SECONDS_MAX
    assert fleet.replica_stats("replica-0")["in_flight"] == 0
    assert fleet.stats()["gateway"]["clients_left"] == left + 1


def leave_while_it_is_computed(fleet, endpoint, body, headers) -> None:
    """Send a request on a connection of its own, wait until the engine computes it, close the connection."""
    head = httpx.Request("POST", fleet.url + endpoint, json=body, headers=headers)
    lines = [f"POST {endpoint} HTTP/1.1", *(f"{name}: {value}" for name, value in head.headers.items())]
    with socket.create_connection(("127.0.0.1", fleet.port), timeout=ANSWER_SECONDS_MAX) as connection:
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + head.content)
        until(lambda: running(fleet, "replica-0") == 1, ANSWER_SECONDS_MAX, "the engine computes the request")
