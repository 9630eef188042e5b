"""The settings of the server of shared limits: what is refused, in words without secrets, and what gets in."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.errors import SettingsError
from gateway.settings import load
from gateway.settings_limits import limits_address


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://limits.lan:6379", "is not like valkey://host:6379"),
        ("valkey://user:a-secret-word@limits.lan:6379/zero", "only the number of a database"),
        ("valkey://user:a-secret-word@limits.lan:port", "is not a URL"),
    ],
)
def test_an_address_that_is_none_is_refused_at_once_without_its_password(url: str, words: str) -> None:
    with pytest.raises(SettingsError, match=r"limits_valkey: .*the server's") as caught:
        load({"limits_valkey": url})
    assert words in str(caught.value)
    assert "a-secret-word" not in str(caught.value)


def test_the_password_may_come_with_the_other_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_SECRETS_DIR", str(tmp_path))
    (tmp_path / "peerkv_limits_valkey_password").write_text("a-secret-word\n")
    settings = load({"limits_valkey": "valkeys://limits@limits.lan/3"})
    address = limits_address(settings)
    assert address is not None
    assert (address.user, address.password, address.tls, address.port, address.database) == (
        *("limits", "a-secret-word", True),
        *(6379, 3),
    )
    assert "a-secret-word" not in f"{address!r} {settings!r} {address.shown}"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    settings = load({"limits_valkey": "valkey://limits.lan", "limits_valkey_password_file": tmp_path / "none"})
    with pytest.raises(SettingsError, match="limits_valkey: a file for the server cannot be used"):
        limits_address(settings)
    assert limits_address(load()) is None
