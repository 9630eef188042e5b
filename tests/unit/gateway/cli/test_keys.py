"""`peerkv keys`: what the commands do to the file, print, and refuse."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gateway.cli.main import main
from gateway.errors import NotAuthenticated
from gateway.tenants.key_file import read_keys, write_keys
from gateway.tenants.tenants import Tenants


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.upper().startswith("PEERKV_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "keys.toml"
    monkeypatch.setenv("PEERKV_KEYS_FILE", str(path))
    return path


def token_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.strip()


def tenant_of(path: Path, token: str, later: timedelta = timedelta()) -> str:
    then = (datetime.now(UTC) + later).timestamp()
    try:
        return Tenants([], keys=read_keys(path), clock=lambda: then).authenticate(f"Bearer {token}".encode()).name
    except NotAuthenticated as refused:
        return refused.message


def test_an_added_key_works_and_is_shown_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "add", "alice", "--tenant", "team", "--expires", "30d"]) == 0
    token = token_of(capsys)
    assert tenant_of(path, token) == "team"
    assert tenant_of(path, token, timedelta(days=31)) == "This API key has expired."
    assert main(["keys", "list", "--json"]) == 0
    shown = capsys.readouterr().out
    assert token not in shown
    assert "sha256" not in shown
    [listed] = json.loads(shown)
    assert (listed["name"], listed["tenant"], listed["state"]) == ("alice", "team", "active")


def test_a_revoked_key_is_refused_and_stays_listed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["keys", "add", "alice"])
    token = token_of(capsys)
    assert main(["keys", "revoke", "alice"]) == 0
    assert tenant_of(path, token) == "This API key was revoked."
    capsys.readouterr()
    assert main(["keys", "list"]) == 0
    assert "revoked" in capsys.readouterr().out


def test_a_rotated_key_works_beside_the_new_one_until_its_grace_is_over(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["keys", "add", "alice"])
    old = token_of(capsys)
    assert main(["keys", "rotate", "alice", "--grace", "2h"]) == 0
    new = token_of(capsys)
    assert tenant_of(path, old) == tenant_of(path, new) == "alice"
    assert tenant_of(path, old, timedelta(hours=3)) == "This API key has expired."
    assert tenant_of(path, new, timedelta(hours=3)) == "alice"
    assert main(["keys", "rotate", "alice", "--grace", "0s"]) == 0
    newest = token_of(capsys)
    assert "Incorrect" in tenant_of(path, new)
    assert "Incorrect" in tenant_of(path, old)
    assert tenant_of(path, newest) == "alice"


def test_a_revoked_key_gives_way_to_a_new_one_of_its_name(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["keys", "add", "alice", "--n-max", "2"])
    old = token_of(capsys)
    main(["keys", "revoke", "alice"])
    assert main(["keys", "rotate", "alice"]) == 1
    assert "revoked; `peerkv keys add alice` makes a new one in its place" in capsys.readouterr().err
    assert main(["keys", "add", "alice"]) == 0
    told = capsys.readouterr()
    assert "it takes the place of one that was revoked" in told.err
    assert tenant_of(path, told.out.strip()) == "alice"
    assert "Incorrect" in tenant_of(path, old)
    assert [(key.name, key.n_max) for key in read_keys(path).keys] == [("alice", None)]


def test_an_expired_key_gives_way_to_a_new_one_of_its_name(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["keys", "add", "alice"])
    [key] = (keys := read_keys(path)).keys
    write_keys(path, keys.with_key(key.model_copy(update={"expires": datetime(2020, 1, 1, tzinfo=UTC)})))
    capsys.readouterr()
    assert main(["keys", "add", "alice"]) == 0
    told = capsys.readouterr()
    assert "it takes the place of one that was expired" in told.err
    assert tenant_of(path, told.out.strip()) == "alice"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["add", "alice"], 1, "already"),
        (["revoke", "bob"], 1, "no key 'bob'; there are: alice"),
        (["rotate", "bob"], 1, "no key 'bob'"),
        (["rotate", "alice", "--grace", "soon"], 2, "--grace"),
        (["add", "bob", "--expires", "2020-01-01"], 2, "over already"),
        (["add", "bob", "--expires", "1y"], 2, "neither a span"),
        (["add", "bo b"], 2, "name: must begin with a letter or digit and have only letters, digits and . _ @ + -"),
        (["add", "bob", "--tenant", "a/b"], 2, "tenant: must begin with a letter or digit"),
        (["add", "bob", "--tenant", "admin"], 2, "tenant"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, words: str
) -> None:
    main(["keys", "add", "alice"])
    before = path.read_bytes()
    capsys.readouterr()
    assert main(["keys", *arguments]) == status
    assert words in capsys.readouterr().err
    assert path.read_bytes() == before


def test_without_a_file_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("PEERKV_KEYS_FILE")
    assert main(["keys", "list"]) == 2
    assert "--keys-file" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["add", "list", "revoke", "rotate"])
def test_the_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["keys", verb, "--help"])
    assert f"Example: peerkv keys {verb}" in " ".join(capsys.readouterr().out.split())


def test_limits_are_kept_with_the_key_and_outlive_its_rotation(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = [
        "--requests-per-minute",
        "60",
        "--tokens-per-day",
        "5000",
        "--max-tokens-max",
        "100",
        "--model",
        "m",
        "--model",
        "n",
    ]
    assert main(["keys", "add", "alice", *limits, "--priority", "low"]) == 0
    assert main(["keys", "rotate", "alice"]) == 0
    [key] = read_keys(path).keys
    assert (key.requests_per_minute, key.tokens_per_day, key.max_tokens_max, key.n_max) == (60, 5000, 100, None)
    assert key.models == ("m", "n")
    assert key.priority == "low"
    assert key.is_limited
    capsys.readouterr()
    assert main(["keys", "add", "bob", "--requests-per-minute", "0"]) == 2
    assert "requests-per-minute" in capsys.readouterr().err


def test_tenants_of_a_group_share_a_cache_and_a_tenants_keys_stay_in_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "add", "alice", "--group", "team"]) == 0
    assert main(["keys", "add", "bob", "--group", "team"]) == 0
    assert main(["keys", "add", "carol"]) == 0
    assert main(["keys", "add", "alice-too", "--tenant", "alice"]) == 0
    assert [key.group for key in read_keys(path).keys] == ["team", "team", None, "team"]
    tenants = Tenants([], keys=read_keys(path))
    alice, bob, carol = (tenants.named(name).salt for name in ("alice", "bob", "carol"))  # type: ignore[union-attr]
    assert alice == bob != carol
    capsys.readouterr()
    assert main(["keys", "add", "carol-too", "--tenant", "carol", "--group", "team"]) == 1
    assert "the tenant 'carol' has keys of no group, and one cache" in capsys.readouterr().err
    assert main(["keys", "list"]) == 0
    assert "group=team" in capsys.readouterr().out
    main(["keys", "revoke", "carol"])
    assert main(["keys", "add", "carol", "--group", "team"]) == 0
    assert main(["keys", "rotate", "carol"]) == 0
    assert read_keys(path).group_of("carol") == "team"
