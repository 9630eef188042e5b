"""`peerkv bench` against gateways on loopback: one that remembers prompts, and a real front door over fake engines."""

import argparse
import asyncio
import io
import json
import signal
import socket
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pydantic import SecretStr
from rich.console import Console

from engine.fleet import write_fleet
from gateway.cli.bench import first_token, flags
from gateway.cli.bench.command import run
from gateway.cli.bench.installation import NotMeasured
from gateway.cli.main import build_parser
from gateway.settings import Tenant
from gateway.tenants.loopback import port_here
from gateway.tenants.tenants import ADMIN
from tests.unit.gateway.cli.caching_gateway import CachingGateway, serving
from tests.unit.gateway.running_door import DEADLINE_SECONDS, running_door, until

_AS_IN_A_TERMINAL = (  # a shell's background job, which these tests may be, ignores SIGINT, and so do all that it starts
    "import signal, sys; from gateway.cli.main import main; "
    "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(main())"
)
SMALL = ("--lengths", "64", "256", "--samples", "2", "--pairs", "3", "--seconds", "0.5", "--rate", "20", "--answer-tokens", "2")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_token, "SETTLE_SECONDS", 0.0)


async def bench(*arguments: str) -> tuple[int, str]:
    """The exit status and what was printed."""
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    console = Console(file=io.StringIO(), width=160, no_color=True)
    quiet = Console(file=io.StringIO())
    status = await asyncio.to_thread(run, parser.parse_args(arguments), console, quiet)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue()


async def test_cold_import_and_local_hit_are_measured_and_told_apart(tmp_path: Path) -> None:
    async with serving(CachingGateway()) as gateway:
        status, output = await bench("--url", gateway.url, *SMALL, "--json", str(tmp_path / "b.json"))
    assert status == 0
    written = json.loads((tmp_path / "b.json").read_text())
    assert [row["tokens"] for row in written["first_token"]] == [64, 256]
    for row in written["first_token"]:
        assert {kind: each["count"] for kind, each in row["seconds"].items()} == {"cold": 2, "import": 2, "local hit": 2}
        assert row["prompt_tokens"] == row["tokens"]  # it learnt that a word is two tokens
    assert len(written["samples"]) == 2 * 2 * 3
    assert written["throughput"]["failures"] == 0
    assert written["throughput"]["requests"] > 1
    assert "cold/this" in output
    assert "answered by the gateway itself" in output
    assert "open loop" in output


async def test_a_hit_is_asked_for_where_the_prompt_is_and_an_import_where_it_is_not() -> None:
    async with serving(CachingGateway()) as gateway:
        await bench("--url", gateway.url, *SMALL, "--only", "first-token")
    pinned: dict[str, list[str]] = {}
    for replica, prompt in gateway.asked[5:]:  # the first five warm up
        pinned.setdefault(prompt, []).append(replica)
    assert len(pinned) == 2 * 2
    for replicas in pinned.values():
        home, *again = replicas
        assert sorted(again) == sorted({"replica-0", "replica-1"})
        assert home in again


async def test_samples_that_went_another_way_are_tried_again_then_left_out_and_said() -> None:
    async with serving(CachingGateway(forgets=frozenset({"peer"}))) as gateway:
        status, output = await bench("--url", gateway.url, *SMALL, "--only", "first-token")
    assert status == 0
    assert "no import of 64 tokens was measured" in output
    assert "8 of 24 samples are left out" in output


async def test_replicas_that_do_not_exchange_are_named_and_not_asked_to(tmp_path: Path) -> None:
    async with serving(CachingGateway(incompatible={"replica-1": ["dtype: a here, b there"]})) as gateway:
        _, output = await bench("--url", gateway.url, *SMALL, "--only", "first-token")
    assert "no imports were measured: replica-0 does not import from replica-1: dtype: a here, b there" in output
    assert len(gateway.asked) == 5 + 2 * 2 * 2


async def test_the_plot_is_an_svg_of_all_kinds(tmp_path: Path) -> None:
    async with serving(CachingGateway()) as gateway:
        await bench("--url", gateway.url, *SMALL, "--only", "first-token", "--plot", str(tmp_path / "b.svg"))
    texts = [node.text for node in ElementTree.parse(tmp_path / "b.svg").iter() if node.text]
    assert {"cold", "import", "local hit"} <= set(texts)


async def test_the_admin_key_is_sent_and_asked_for() -> None:
    async with serving(CachingGateway(key="a-long-secret")) as gateway:
        status, _ = await bench("--url", gateway.url, *SMALL, "--only", "first-token", "--admin-key", "a-long-secret")
        assert status == 0
        with pytest.raises(NotMeasured, match="pass --admin-key"):
            await bench("--url", gateway.url, *SMALL)


async def test_with_tenants_and_an_admin_key_replicas_are_chosen_in_the_admins_name(tmp_path: Path) -> None:
    tenant, admin = Tenant(name="a", api_key=SecretStr("key-of-a-1")), Tenant(name=ADMIN, api_key=SecretStr("admin-key-1"))
    async with running_door(tmp_path, admin_key=admin.api_key, tenants=[tenant]) as door:
        engine = await door.add_engine("replica-0")
        arguments = ("--url", door.url, *SMALL, "--api-key", "key-of-a-1")
        status, _ = await bench(*arguments, "--only", "first-token", "throughput", "--admin-key", "admin-key-1")
        assert status == 0
        asked = [request["body"] for request in engine.seen["requests"]]
        salts = {door.tenants.named(name).salt for name in (tenant.name, ADMIN)}  # type: ignore[union-attr]
        assert {body["cache_salt"] for body in asked} == salts


async def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(NotMeasured, match="peerkv serve"):
            await bench("--url", f"http://127.0.0.1:{unused.getsockname()[1]}")
    async with serving(CachingGateway(status=503)) as gateway:
        with pytest.raises(NotMeasured, match="status 503"):
            await bench("--url", gateway.url, *SMALL)
        gateway.status = 200
        with pytest.raises(NotMeasured, match="does not fit into the context of 4096"):
            await bench("--url", gateway.url, "--lengths", "5000")
        with pytest.raises(NotMeasured, match="cannot be written"):
            await bench("--url", gateway.url, "--json", str(tmp_path / "absent" / "b.json"))


async def test_a_real_front_door_is_measured_through_and_past_it(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        door.recorder.header = b"local=0, peer=0, computed=64, reason=cold"  # a fake engine has no cache
        await door.add_engine("replica-0")
        write_fleet(tmp_path, door.fleet.snapshot())
        config = tmp_path / "peerkv.toml"
        config.write_text(f'run_dir = "{tmp_path}"\n')
        arguments = ("--url", door.url, "--config", str(config), *SMALL, "--json", str(tmp_path / "b.json"))
        status, output = await bench(*arguments)
    written = json.loads((tmp_path / "b.json").read_text())
    assert status == 0
    assert written["overhead"]["direct"]["count"] == written["overhead"]["added"]["count"] == 3
    assert "the gateway adds (in pairs)" in output
    assert set(written["first_token"][0]["seconds"]) == {"cold"}
    assert "no local hit of 64 tokens was measured" in output
    assert "no imports were measured: there is only one replica" in output


async def test_the_replicas_of_a_url_on_this_machine_are_found_by_its_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.settings.default_run_dir", lambda port: tmp_path / str(port))
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        (tmp_path / str(door.port)).mkdir()
        write_fleet(tmp_path / str(door.port), door.fleet.snapshot())
        status, output = await bench("--url", door.url, *SMALL, "--only", "overhead")
    assert status == 0
    assert "the gateway adds (in pairs)" in output
    assert "not measured" not in output


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("http://127.0.0.1:22100", 22100),
        ("http://localhost:1/", 1),
        ("https://[::1]", 443),
        ("http://127.0.0.1", 80),
        ("http://127.0.0.1:99999", None),
        ("http://gateway.lan:8000", None),
    ],
)
def test_the_port_of_a_loopback_url(url: str, port: int | None) -> None:
    assert port_here(url) == port


async def test_ctrl_c_ends_it_with_what_was_measured() -> None:
    async with serving(CachingGateway()) as gateway:
        command = (
            sys.executable,
            "-c",
            _AS_IN_A_TERMINAL,
            "bench",
            "--url",
            gateway.url,
            *SMALL[:-6],
            "--rate",
            "20",
            "--seconds",
            "600",
        )
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
        try:
            await until(lambda: any(not replica for replica, _ in gateway.asked))  # the throughput run has begun
            process.send_signal(signal.SIGINT)
            output, errors = await asyncio.wait_for(process.communicate(), DEADLINE_SECONDS)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode == 130
    assert b"stopped; results so far" in errors
    assert b"Traceback" not in errors
    assert b"seconds to the first token" in output


def test_the_command_line_knows_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["bench", "--help"])
    assert "--plot FILE" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        build_parser().parse_args(["bench", "--samples", "0"])
