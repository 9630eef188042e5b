"""`peerkv kv prefixes`, `pin`, `unpin` and `flush`: what they ask of the gateway, and what they say."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter
from rich.console import Console

from gateway.cli.asking import run
from gateway.cli.main import build_parser
from gateway.kept_prefixes.book import KeptPrefixAnswer, PlaceState, PrefixPlace
from gateway.kept_prefixes.shapes import Prefix, PrefixRemoved, PrefixReport

PLACE = PrefixPlace(
    replica="replica-1", state=PlaceState.PINNED, local_tokens=0, peer_tokens=0, computed_tokens=64, source="", reason=""
)
KEPT = KeptPrefixAnswer(
    id="p-1",
    tenant="",
    model="",
    tokens=70,
    whole_tokens=64,
    pin=True,
    renew=False,
    ttl=60,
    created=1e9,
    expires=1e9 + 60,
    places=[PLACE],
)


class Gateway:
    """Answers one status and body, and keeps what it was asked."""

    def __init__(self, status: int, body: Any) -> None:
        self.status, self.body = status, body if isinstance(body, str) else TypeAdapter(type(body)).dump_json(body).decode()
        self.asked: list[tuple[str, str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        self.asked.append((request.method, request.url.raw_path.decode(), body))
        return httpx.Response(self.status, content=self.body)

    def run(self, *words: str) -> tuple[int, str]:
        output = io.StringIO()
        parsed = build_parser().parse_args(["kv", *words, "--url", "http://gateway:1"])
        status = run(parsed, Console(file=output, width=120), httpx.MockTransport(self))
        return status, output.getvalue()


def test_prefixes_shows_the_requested_and_the_kept_ones() -> None:
    asked = Prefix(key="ab" * 16, tokens=1984, requests=7, last_used=1e9, holders=["replica-0", "replica-1"])
    gateway = Gateway(200, PrefixReport(tracked_blocks=1, tracked_blocks_max=2, prefixes=[asked], kept=[KEPT]))
    status, output = gateway.run("prefixes", "--limit", "5")
    assert (status, gateway.asked) == (0, [("GET", "/kv/prefixes?limit=5", None)])
    for words in ("abababab", "1,984", "replica-0, replica-1", "p-1", "replica-1 pinned"):
        assert words in output


def test_prefixes_says_when_there_are_none() -> None:
    gateway = Gateway(200, PrefixReport(tracked_blocks=0, tracked_blocks_max=2, prefixes=[]))
    assert "no prefix has been requested twice" in gateway.run("prefixes")[1]


def test_pin_keeps_a_text_and_shows_where() -> None:
    gateway = Gateway(201, KEPT)
    status, output = gateway.run("pin", "You are", "--replicas", "2", "--ttl", "60", "--tenant", "a", "--renew")
    body = {"text": "You are", "replicas": 2, "ttl": 60.0, "tenant": "a", "pin": True, "renew": True}
    assert (status, gateway.asked) == (0, [("POST", "/kv/prefixes", body)])
    assert "p-1: 64 of 70 tokens for 60 s: replica-1 pinned" in output


@pytest.mark.parametrize(("given", "seconds"), [("90", 90.0), ("0.5", 0.5), ("1h", 3600.0), ("2d", 172800.0)])
def test_pin_takes_seconds_and_spans(given: str, seconds: float) -> None:
    gateway = Gateway(201, KEPT)
    assert gateway.run("pin", "x", "--ttl", given)[0] == 0
    assert gateway.asked[0][2]["ttl"] == seconds


def test_a_ttl_that_is_no_span_is_told_what_one_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Gateway(201, KEPT).run("pin", "x", "--ttl", "soon")
    assert "'soon' is neither a number of seconds nor a span, such as 30m, 12h or 90d" in capsys.readouterr().err


def test_a_pin_that_was_refused_is_a_failure() -> None:
    refused = replace(KEPT, places=[replace(PLACE, state=PlaceState.REFUSED, reason="pins are full")])
    status, output = Gateway(201, refused).run("pin", "x")
    assert status == 1
    assert "replica-1 refused (pins are full)" in output
    assert Gateway(201, replace(refused, pin=False, places=[replace(PLACE, state=PlaceState.WARM)])).run("pin", "x")[0] == 0
    assert Gateway(201, replace(refused, places=[*refused.places, PLACE])).run("pin", "x")[0] == 0


def test_a_wrong_admin_key_is_told_apart_from_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert Gateway(401, "{}").run("prefixes", "--admin-key", "wrong")[0] == 1
    assert capsys.readouterr().err == "peerkv: the gateway refuses this admin key\n"


def test_pin_reads_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway, file = Gateway(201, KEPT), tmp_path / "f"
    file.write_text("Grüezi")
    gateway.run("pin", "--file", str(file), "--no-pin")
    file.write_text('[{"role": "system", "content": "x"}]')
    gateway.run("pin", "--messages", str(file))
    monkeypatch.setattr("sys.stdin", io.StringIO("typed"))
    gateway.run("pin", "--file", "-")
    bodies = [body for _, _, body in gateway.asked]
    assert bodies[0] == {"text": "Grüezi", "pin": False, "renew": False}
    assert bodies[1] == {"messages": [{"role": "system", "content": "x"}], "pin": True, "renew": False}
    assert bodies[2]["text"] == "typed"


@pytest.mark.parametrize("words", [("--messages", "not json"), ("--file", None)])
def test_a_file_that_can_not_be_used_is_an_error_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, str | None]
) -> None:
    flag, content = words
    if content is not None:
        (tmp_path / "f").write_text(content)
    gateway = Gateway(201, KEPT)
    assert gateway.run("pin", flag, str(tmp_path / "f"))[0] == 1
    assert gateway.asked == []
    assert capsys.readouterr().err.count("\n") == 1


def test_pin_wants_one_of_text_file_and_messages() -> None:
    for words in ([], ["text", "--file", "f"]):
        with pytest.raises(SystemExit):
            build_parser().parse_args(["kv", "pin", *words])


def test_a_refusal_is_told_in_the_gateways_words(capsys: pytest.CaptureFixture[str]) -> None:
    gateway = Gateway(409, json.dumps({"error": {"message": "As many prefixes are kept as may be."}}))
    assert gateway.run("pin", "x")[0] == 1
    assert "409" in (told := capsys.readouterr().err)
    assert "As many prefixes are kept as may be." in told


def test_a_pin_without_its_tenant_is_told_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    message = "'tenant' is missing: each tenant has a cache of its own."
    assert Gateway(400, {"error": {"message": message}}).run("pin", "hello")[0] == 1
    assert capsys.readouterr().err == "peerkv: --tenant is missing: each tenant has a cache of its own.\n"


def test_unpin_names_the_prefix_and_where_it_was() -> None:
    gateway = Gateway(200, PrefixRemoved(id="p/1", unpinned=["replica-1"], failed={"replica-0": "it is gone"}))
    status, output = gateway.run("unpin", "p/1")
    assert (status, gateway.asked) == (0, [("DELETE", "/kv/prefixes/p%2F1", None)])
    assert "unpinned on replica-1" in output
    assert "replica-0 could not be told" in output


def test_unpin_of_an_unknown_prefix_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert Gateway(404, "{}").run("unpin", "p-9")[0] == 1
    assert "no prefix 'p-9' is kept" in capsys.readouterr().err


def test_flush_says_who_was_emptied_and_who_was_not() -> None:
    gateway = Gateway(200, json.dumps({"flushed": ["replica-0", "replica-1"], "failed": {}}))
    assert gateway.run("flush") == (0, "emptied: replica-0, replica-1\n")
    assert gateway.asked == [("POST", "/kv/flush", None)]
    lost = {"flushed": ["replica-0"], "failed": {}, "prefixes": {"kept": 3, "renewed": 1}}
    assert "were there: 3; put back, as they are renewed: 1; gone: 2\n" in Gateway(200, json.dumps(lost)).run("flush")[1]
    others = {"flushed": ["replica-0", "node-b:replica-0"], "failed": {}, "disks_left": ["node-b"]}
    assert "a disk of node-b is emptied by `peerkv kv flush` there\n" in Gateway(200, json.dumps(others)).run("flush")[1]
    busy = Gateway(502, json.dumps({"flushed": ["replica-0"], "failed": {"replica-1": "requests are using its blocks"}}))
    status, output = busy.run("flush")
    assert status == 1
    assert "replica-1 was not emptied: requests are using its blocks" in output


def test_the_help_of_flush_says_what_becomes_of_pins(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["kv", "flush", "--help"])
    assert "only those pinned with --renew are computed and pinned again" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("words", [("prefixes",), ("pin", "x"), ("unpin", "x"), ("flush",)])
def test_each_gives_the_gateways_answer_as_json_and_refuses_what_is_no_peerkv(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert Gateway(200, "[]").run(*words)[0] == 1
    assert "not from a peerkv of this version" in capsys.readouterr().err
    assert Gateway(403, "{}").run(*words)[0] == 1
    assert "admin key" in capsys.readouterr().err
    if words[0] == "pin":
        assert json.loads(Gateway(201, KEPT).run(*words, "--json")[1])["id"] == "p-1"
