"""`peerkv kv stats` against a gateway that answers from memory."""

import argparse
import io
import json
import shlex
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ByteSize, SecretStr
from rich.console import Console

from engine.fleet import ReplicaState
from engine.frame_tiers.store import StoreStats
from gateway.cli import kv_explain, kv_stats
from gateway.cli.kv_stats import add_arguments, render, run, short
from gateway.cli.main import build_parser
from gateway.ledger.stats import LedgerStats
from gateway.serve.banner import banner, command
from gateway.settings import Settings
from gateway.stats.shapes import KvStats, TiersBelow
from tests.unit.gateway.stats.test_snapshot import Scene
from tests.unit.transport.replica_tables import FIELDS, replica_tables


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with replica_tables(tmp_path / "tables") as tables:
        tables.start("a")
        tables.start("b", fields={**FIELDS, "dtype": "float32"})
        made = Scene(tables)
        made.count("a", prompt_tokens=1000, local_tokens=200, peer_tokens_shared_memory=700, computed_tokens=100)
        made.count("a", imports=2, import_bytes=3 << 20, import_nanoseconds=250_000_000, fallbacks=1)
        yield made


def shown(text: Callable[[Console], object]) -> str:
    console = Console(file=io.StringIO(), width=200, no_color=True)
    text(console)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def ask(answer: httpx.Response | httpx.HTTPError, *flags: str) -> tuple[int, str, list[httpx.Request]]:
    seen: list[httpx.Request] = []

    def reply(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if isinstance(answer, httpx.HTTPError):
            raise answer
        return answer

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args([*(("--url", "http://gateway:1") if "--config" not in flags else ()), *flags])
    status: list[int] = []
    output = shown(lambda console: status.append(run(arguments, console, httpx.MockTransport(reply))))
    return status[0], output, seen


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """What reaches a proxy that the environment names for everything."""
    taken: list[bytes] = []

    class Taking(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            taken.append(f"{self.path} {self.headers}".encode())
            self.send_error(502)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Taking)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield taken
    server.shutdown()
    server.server_close()


def follow(module: Any, *given: str) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    status: int = module.run(parser.parse_args(given), Console(file=io.StringIO()))
    return status


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_the_admin_key_for_a_gateway_on_this_machine_never_goes_to_a_proxy(host: str, proxy: list[bytes]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        flags = ("--url", f"http://{host}:{nobody.getsockname()[1]}", "--admin-key", "the-admin-key")
        assert follow(kv_stats, *flags, "--once") == follow(kv_explain, *flags, "an-id") == 1
    assert not proxy


def test_a_gateway_elsewhere_is_asked_by_the_proxy_of_the_environment(proxy: list[bytes]) -> None:
    assert follow(kv_stats, "--url", "http://gateway.invalid:8000", "--once") == 1
    assert len(proxy) == 1


def body(scene: Scene) -> httpx.Response:
    return httpx.Response(200, content=scene.snapshot().model_dump_json())


def test_the_table_shows_tokens_hit_rate_imports_and_what_differs(scene: Scene) -> None:
    output = shown(lambda console: console.print(render(scene.snapshot(), None, 0.0)))
    row = next(line for line in output.splitlines() if line.strip().startswith("a "))
    assert row.split() == ["a", "ready", "0", "0/256", "200", "700", "100", "90%", "3", "125.0", "1"]
    assert "a does not import from b: dtype: bfloat16 here, float32 there" in output
    assert "token ids of chat: unknown" in output


def test_a_fleet_of_usual_names_fits_into_eighty_columns(scene: Scene) -> None:
    scene.count("a", prompt_tokens=9_000_000, local_tokens=9_000_000)
    console = Console(file=io.StringIO(), width=80, no_color=True)
    console.print(render(scene.snapshot(), None, 0.0))
    assert "…" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_large_counts_are_written_short() -> None:
    counts = (0, 999_999, 1_000_000, 2_340_000_000, 5 * 10**12)
    assert [short(count) for count in counts] == ["0", "999,999", "1.0M", "2.3G", "5.0T"]


def test_a_replica_that_is_not_ready_says_why(scene: Scene) -> None:
    scene.fleet.set("b", ReplicaState.BACKOFF, reason="killed by signal 9")
    output = shown(lambda console: console.print(render(scene.snapshot(), None, 0.0)))
    assert "b has ended and is started again soon: killed by signal 9" in output
    scene.fleet.set("b", ReplicaState.DRAINING, reason="draining")
    output = shown(lambda console: console.print(render(scene.snapshot(), None, 0.0)))
    assert "b is draining" in [line.strip() for line in output.splitlines()]


def test_rates_come_from_two_looks(scene: Scene) -> None:
    before = scene.snapshot()
    scene.count("a", prompt_tokens=50, peer_tokens_shared_memory=40, computed_tokens=10)
    output = shown(lambda console: console.print(render(scene.snapshot(), before, 2.0)))
    assert "25 prompt tokens/s, 20 of them from peers" in output


def test_once_prints_the_table_and_sends_the_admin_key(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEERKV_ADMIN_KEY", raising=False)
    status, output, seen = ask(body(scene), "--once", "--admin-key", "secret-key")
    assert (status, str(seen[0].url)) == (0, "http://gateway:1/kv/stats")
    assert seen[0].headers["authorization"] == "Bearer secret-key"
    assert "total" in output


def test_the_admin_key_may_come_from_the_environment(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_ADMIN_KEY", "from-there")
    assert ask(body(scene), "--once")[2][0].headers["authorization"] == "Bearer from-there"


def test_address_and_admin_key_come_from_the_settings(scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PEERKV_HOST", "PEERKV_PORT", "PEERKV_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    config = tmp_path / "peerkv.toml"
    config.write_text('host = "0.0.0.0"\nport = 1001\nadmin_key = "from-the-file"\n')
    request = ask(body(scene), "--once", "--config", str(config))[2][0]
    assert (str(request.url), request.headers["authorization"]) == ("http://127.0.0.1:1001/kv/stats", "Bearer from-the-file")


def test_json_is_the_body_itself(scene: Scene) -> None:
    status, output, _ = ask(body(scene), "--json")
    assert status == 0
    assert KvStats.model_validate(json.loads(output)).totals.tokens.prompt == 1000


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            httpx.ConnectError("refused"),
            "no gateway is answering at http://gateway:1: refused; start one by `peerkv serve`, or name its --port",
        ),
        (httpx.Response(401), "--admin-key"),
        (httpx.Response(403), "--admin-key"),
        (httpx.Response(500), "answered 500"),
        (httpx.Response(200, content=b"{}"), "not from a peerkv of this version"),
    ],
)
def test_a_gateway_that_can_not_be_read_is_an_error_that_says_what_to_do(
    answer: httpx.Response | httpx.HTTPError, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, output, _ = ask(answer, "--once")
    assert (status, output) == (1, "")
    assert words in capsys.readouterr().err


def test_on_a_terminal_the_table_follows_until_the_gateway_ends(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    looks = 0

    def reply(request: httpx.Request) -> httpx.Response:
        nonlocal looks
        looks += 1
        scene.count("a", prompt_tokens=10, computed_tokens=10)
        if looks > 3:
            raise httpx.ConnectError("gone")
        return body(scene)

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    assert run(parser.parse_args(["--interval", "0.1"]), console, httpx.MockTransport(reply)) == 1
    assert looks == 4
    assert "prompt tokens/s" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "no gateway is answering" in capsys.readouterr().err


def test_the_banner_gives_the_url_when_it_is_not_the_usual_one(scene: Scene) -> None:
    shown_at = {port: banner(Settings(port=port), [scene.fleet.snapshot()], None) for port in (8000, 8001)}
    assert f"{command()} kv stats\n" in shown_at[8000]
    assert f"{command()} kv stats --url http://127.0.0.1:8001\n" in shown_at[8001]


def test_the_banner_names_the_program_by_its_path_where_the_shell_would_not_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "my env" / "peerkv"
    own.parent.mkdir()
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setattr("sys.argv", [str(own)])
    monkeypatch.setenv("PATH", "/nonexistent")
    assert command() == f"'{own}'"
    monkeypatch.setenv("PATH", str(own.parent))
    assert command() == "peerkv"
    (tmp_path / "peerkv").write_text("#!/bin/sh\n")
    (tmp_path / "peerkv").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))  # another program of that name
    assert command() == f"'{own}'"


@pytest.mark.parametrize(("in_shell", "shown"), [("secret-admin-key", "$PEERKV_ADMIN_KEY"), (None, "…"), ("another", "…")])
def test_the_figures_line_works_when_pasted_and_shows_no_key(
    in_shell: str | None, shown: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PEERKV_ADMIN_KEY", raising=False)
    if in_shell:
        monkeypatch.setenv("PEERKV_ADMIN_KEY", in_shell)
    text = banner(Settings(admin_key="secret-admin-key"), [scene.fleet.snapshot()], None)
    (line,) = [line for line in text.splitlines() if "figures" in line]
    words = shlex.split(line.removeprefix("  figures "))
    parsed = build_parser().parse_args(words[words.index("kv") :])
    assert parsed.admin_key == shown
    assert "secret" not in text


def test_the_notes_say_why_prompts_were_not_cached(scene: Scene) -> None:
    stats = scene.snapshot()
    ledger = LedgerStats(requests={"none": 5, "load": 1200, "cold": 0}, lost_tokens={"load": 3_000_000}, predicted_tokens=70)
    output = shown(lambda console: console.print(render(stats.model_copy(update={"ledger": ledger}), None, 0.0)))
    assert "none 5, load 1,200 (-3.0M)" in output
    assert "70 expected, 0 delivered" in output


def test_the_banner_names_host_memory_where_there_is_some(scene: Scene, tmp_path: Path) -> None:
    text = banner(Settings(host_memory=ByteSize(2 << 30)), [scene.fleet.snapshot()], tmp_path)
    assert "  tiers      host memory 2048 MiB, shared by all replicas\n" in text
    assert "host memory" not in banner(Settings(), [scene.fleet.snapshot()], tmp_path)


def test_what_host_memory_holds_is_shown(scene: Scene) -> None:
    assert "host memory" not in shown(lambda console: console.print(render(scene.snapshot(), None, 0.0)))
    scene.tables.start("a.host-memory", blocks=64)
    scene.tables.hold("a.host-memory", range(40))
    text = shown(lambda console: console.print(render(scene.snapshot(), None, 0.0)))
    assert "host memory: 10 of 64 blocks used, 0 tokens restored" in text


def test_what_disk_and_vault_hold_and_what_is_wrong_with_them_is_shown(scene: Scene) -> None:
    stores = [
        StoreStats("disk", state="read-only: /cache is full", frames=1200, bytes=3 << 30, bytes_max=4 << 30),
        StoreStats("vault", frames=7, bytes=1 << 29),
    ]
    below = TiersBelow(stores=stores, lost_blocks=5)
    text = shown(lambda console: console.print(render(scene.snapshot().model_copy(update={"tiers": below}), None, 0.0)))
    assert "disk: 1,200 blocks, 3.0 of 4.0 GiB, 0 tokens restored" in text
    assert "disk: read-only: /cache is full" in text
    assert "vault: 7 blocks, 0.5 GiB, 0 tokens restored" in text
    assert "5 blocks left host memory before they were written" in text


def test_the_banner_names_disk_and_vault_without_a_password(scene: Scene, tmp_path: Path) -> None:
    settings = Settings(disk=Path("/cache"), disk_bytes=ByteSize(2 << 30), vault=SecretStr("valkey://:secret@h"))
    text = banner(settings, [scene.fleet.snapshot()], tmp_path)
    assert "  tiers      disk /cache, 2 GiB; a vault\n" in text
    assert "secret" not in text
