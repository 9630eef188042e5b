"""The command line: flags, help, errors, exit statuses."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from engine.replicas.launch import EngineSettings
from gateway.cli import main as cli
from gateway.cli.doctor import report as doctor
from gateway.cli.flag_groups import GROUPS, OF_GATEWAY, example
from gateway.cli.flags import WITHOUT_FLAG, given_settings
from gateway.cli.main import build_parser, main
from gateway.settings import Settings
from gateway.settings_secrets import OF_FILE

COMMANDS = [["serve"], ["engine"], ["gateway"], ["doctor"], ["kv", "stats"], ["kv", "prefixes"], ["openapi"]]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("PEERKV_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Settings]]:
    """What would have been run, with which settings."""
    found: list[tuple[str, Settings]] = []

    def run(work: Any, settings: Settings, again: Any) -> int:
        found.append((work.__name__, settings))
        return 0

    monkeypatch.setattr(cli, "_run", run)
    return found


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("peerkv 0.")


def test_a_user_whom_nobody_named_has_the_home_that_containers_give(
    runs: list[tuple[str, Settings]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unnamed(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unnamed)
    assert main(["serve"]) == 0
    assert runs[0][1].log_dir == Path("/.local/state/peerkv/logs/8000")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_flag_says_its_default(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    # A boolean has two flags and one default.
    described = [line for line in text.splitlines() if line.startswith("  --")]
    assert described
    assert text.count("(default") >= len(described) - 1 - (command[0] == "kv")


def test_every_setting_has_a_flag_but_those_that_are_named() -> None:
    parsed = vars(build_parser().parse_args(["serve"]))
    assert Settings.model_fields.keys() - parsed.keys() == WITHOUT_FLAG


def test_each_half_has_its_own_flags_and_both_have_those_that_both_read() -> None:
    serve, engine, gateway = (vars(build_parser().parse_args([command])) for command in ("serve", "engine", "gateway"))
    both = Settings.model_fields.keys() & engine.keys() & gateway.keys()
    assert both == {"port", "lossy", "startup_seconds_max", "log_level", "run_dir", "table_dir", "log_dir", "drain_seconds"}
    assert serve.keys() & Settings.model_fields.keys() == (engine.keys() | gateway.keys()) & Settings.model_fields.keys()


def test_what_the_engine_has_no_flag_for_is_nothing_of_the_supervisors() -> None:
    supervisors = {field.name for field in dataclasses.fields(EngineSettings)}
    assert not supervisors & OF_GATEWAY


def test_every_flag_of_a_setting_is_in_one_group_and_has_an_example() -> None:
    placed = [name for names in GROUPS.values() for name in names]
    assert len(placed) == len(set(placed))
    assert set(placed) == Settings.model_fields.keys() - WITHOUT_FLAG - {"model"}


@pytest.mark.parametrize(("name", "value"), [item for names in GROUPS.values() for item in names.items()])
def test_every_example_is_taken(name: str, value: str, runs: list[tuple[str, Settings]], tmp_path: Path) -> None:
    both = ["--tls-cert", "c.pem", "--tls-key", "k.pem"] if name.startswith("tls_") else []  # neither works alone
    both += ["--host-memory", "4GiB"] if name == "host_memory_dir" else []
    if name in OF_FILE.values():  # which are read at once
        held = '[{"name": "a", "api_key": "tenant-key-1"}]' if value.endswith(".json") else "an-admin-key"
        value = str(tmp_path / Path(value).name)
        Path(value).write_text(held)
    assert main(["serve", *both, *example(name, value).split(" ", 1)]) == 0
    assert getattr(runs[0][1], name) != Settings.model_fields[name].get_default(call_default_factory=False)


def test_the_help_names_units_and_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--drain-seconds SECONDS time for running requests to finish" in text
    assert "(default: 33554432, 32 MiB; for example --body-bytes-max 67108864)" in text
    assert all(f"{title}:" in text for title in GROUPS)


SAYS_WHAT_IS_WANTED = {
    "N",
    "N|auto",
    "BYTES",
    "SIZE",
    "SECONDS",
    "SPAN",
    "WHEN",
    "SHARE",
    "HEX",
    "NAME",
    "NAMES",
    "NODES",
    "MODEL",
}
SAYS_WHAT_IS_WANTED |= {"FILE", "FILE|-", "DIR", "URL", "URLS", "ADDRESS", "ADDRESS:PORT", "KEY"}


def flags_with_values(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from flags_with_values(command)
        elif action.option_strings and action.nargs != 0 and not action.choices:
            yield f"{parser.prog} {action.option_strings[-1]}", str(action.metavar)


def test_what_stands_for_a_flags_value_says_what_is_wanted() -> None:
    assert {flag: word for flag, word in flags_with_values(build_parser()) if word not in SAYS_WHAT_IS_WANTED} == {}


def test_a_flag_that_is_not_given_says_nothing() -> None:
    given = given_settings(build_parser().parse_args(["serve"]))
    assert set(given.values()) == {None}


def test_serve_takes_model_flags_and_vllms_arguments(runs: list[tuple[str, Settings]]) -> None:
    arguments = ["serve", "a/model", "--replicas", "3", "--port", "9000", "--no-connector", "--", "--max-model-len", "64"]
    assert main(arguments) == 0
    [(name, settings)] = runs
    assert (name, settings.model, settings.replicas, settings.port) == ("serve", "a/model", 3, 9000)
    assert settings.connector is False
    assert settings.vllm_args == ("--max-model-len", "64")


def test_serve_without_a_model_takes_the_default_one(runs: list[tuple[str, Settings]]) -> None:
    assert main(["serve"]) == 0
    assert runs[0][1].model == ""


@pytest.mark.parametrize("command", ["engine", "gateway"])
def test_the_halves_can_be_run_alone(command: str, runs: list[tuple[str, Settings]]) -> None:
    assert main([command, "--run-dir", "/tmp/x"]) == 0
    assert (runs[0][0], str(runs[0][1].run_dir)) == (command, "/tmp/x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--replicas", "many"], "replicas: must be 'auto'"),
        (["serve", "--config", "/nonexistent.toml"], "cannot read the settings file"),
        (["gateway", "--", "--x"], "are for vLLM"),
        (["serve", "--replica", "1"], "peerkv serve does not take --replica: did you mean --replicas?"),
        (
            ["serve", "m", "--max-model-len", "8"],
            "vLLM's own arguments follow --, as in: peerkv serve MODEL -- --max-model-len",
        ),
        (["serve", "--replica=1", "--max-model-len=8"], "did you mean --replicas? vLLM's own arguments follow --, as in: "),
        (["serve", "--allowed-origins=*"], "does not take --allowed-origins"),
        (["gateway", "--prot=1"], "did you mean --port? See peerkv gateway --help"),
        (["serve", "--tls-cert", "c.pem"], "tls_cert, tls_key (--tls-cert, --tls-key): give both or none"),
        (["gateway", "--tensor-parallel-size=2"], "peerkv gateway does not take --tensor-parallel-size; see"),
        (["gateway", "--replicas", "3"], "--replicas is for `peerkv engine`; the gateway takes the replicas as it finds them"),
        (["gateway", "--no-connector"], "--no-connector is for `peerkv engine`"),
        (["engine", "--keys-file=k.toml"], "--keys-file is for `peerkv gateway`; this command runs only the replicas"),
        (["engine", "m", "--no-imports"], "--no-imports is for `peerkv gateway`"),
        (["kv", "stats", "--onec"], "peerkv kv stats does not take --onec: did you mean --once?"),
        (["kv", "flush", "--quiet"], "peerkv kv flush does not take --quiet; see peerkv kv flush --help"),
        (["serve", "--terminate-seconds", "3"], "it has no flag, but the variable PEERKV_TERMINATE_SECONDS"),
        (["doctor", "extra"], "peerkv doctor does not take extra"),
        (["doctor", "--url", "http://"], "is no URL of a gateway"),
        (["doctor", "--url", "http://x:99999"], "is no URL of a gateway"),
        (["bench", "--port", "many"], "port: "),
        (["serve", "--", "--allowed-origins", "*"], "set cors_origins"),
        (["openapi", "--check", "--output", "/nonexistent.json"], "write it with `peerkv openapi`"),
    ],
)
def test_an_error_is_one_line_on_stderr(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("peerkv: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


def commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers that have no commands of their own."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [found for action in below for each in action.choices.values() for found in commands(each)] or [parser]


def test_every_command_can_say_what_it_does_not_take() -> None:
    found = commands(build_parser())
    assert len(found) > 20
    assert [parser.prog for parser in found if parser.get_default("parser") is not parser] == []


@pytest.mark.parametrize("arguments", [[], ["nope"], ["serve", "--hash-name", "md5"]])
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: peerkv" in capsys.readouterr().err


def test_doctor_gets_the_settings_and_gives_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run(settings: Settings, *, as_json: bool, measure_links: bool, cacert: Path | None) -> int:
        seen.append((settings.port, as_json, measure_links, cacert, settings.admin_key))
        return 1

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor", "--json", "--port", "9001"]) == 1
    assert main(["doctor", "--quick", "--admin-key", "the-admin-key", "--cacert", "/c.pem"]) == 1
    assert seen == [(9001, True, True, None, None), (8000, False, False, Path("/c.pem"), SecretStr("the-admin-key"))]


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("http://10.0.0.7:9001", "10.0.0.7", 9001),
        ("http://[::1]:9002/", "::1", 9002),
        ("localhost:9003", "localhost", 9003),
        ("http://h", "h", 80),
    ],
)
def test_doctor_takes_the_gateways_url(monkeypatch: pytest.MonkeyPatch, url: str, host: str, port: int) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr(doctor, "run", lambda settings, **_: seen.append(settings) or 0)
    assert main(["doctor", "--url", url]) == 0
    assert (seen[0].host, seen[0].port) == (host, port)


def test_kv_commands_take_a_port(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kv", "stats", "--port", "1", "--once"]) == 1
    assert "http://127.0.0.1:1" in capsys.readouterr().err


def test_kv_stats_without_a_gateway_is_status_1() -> None:
    assert main(["kv", "stats", "--url", "http://127.0.0.1:1", "--once"]) == 1


@pytest.mark.parametrize("words", [["--host-memory", "-1GiB"], ["--host-memory=-1GiB"]])
def test_a_negative_size_is_told_to_be_none_however_it_is_written(
    words: list[str], runs: list[tuple[str, Settings]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "model", *words]) == 2
    assert "host_memory: '-1GiB' is neither auto nor a size" in capsys.readouterr().err
    assert runs == []
