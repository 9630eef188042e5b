"""Secrets that come in files: what they beat, what beats them, and what is said of those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.errors import SettingsError
from gateway.secret_files import SECRET_BYTES_MAX
from gateway.settings import load

KEY = "a-secret-key-1"


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEERKV_SECRETS_DIR", str(tmp_path))
    return tmp_path


def admin_key() -> str | None:
    found = load().admin_key
    return None if found is None else found.get_secret_value()


def test_a_key_comes_from_its_file_without_the_lines_end(secrets: Path) -> None:
    (secrets / "peerkv_admin_key").write_text(KEY + "\n")
    assert admin_key() == KEY


def test_tenants_come_from_their_file_as_json(secrets: Path) -> None:
    (secrets / "peerkv_tenants").write_text('[{"name": "a", "api_key": "tenant-key-1"}]')
    assert [tenant.name for tenant in load().tenants] == ["a"]


def test_a_file_that_is_empty_or_not_there_sets_nothing(secrets: Path) -> None:
    (secrets / "peerkv_admin_key").write_text("")
    assert admin_key() is None
    assert load().tenants == ()


def test_the_environment_beats_a_secrets_file_which_beats_the_settings_file(
    secrets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "peerkv.toml"
    config.write_text('admin_key = "from-the-toml-file"')
    monkeypatch.setenv("PEERKV_CONFIG", str(config))
    assert admin_key() == "from-the-toml-file"
    (secrets / "peerkv_admin_key").write_text(KEY)
    assert admin_key() == KEY
    monkeypatch.setenv("PEERKV_ADMIN_KEY", "from-the-environment")
    assert admin_key() == "from-the-environment"


def test_other_files_beside_them_are_left_alone(secrets: Path) -> None:
    (secrets / "hf_token").write_text("hf_x")
    (secrets / "peerkv_port").write_text("1")
    assert load().port == 8000


@pytest.mark.parametrize("content", [b"\xff\xfe", b"k" * (SECRET_BYTES_MAX + 1)])
def test_a_file_that_is_no_secret_is_an_error_that_names_it(secrets: Path, content: bytes) -> None:
    (secrets / "peerkv_admin_key").write_bytes(content)
    with pytest.raises(SettingsError, match="peerkv_admin_key"):
        load()


def test_what_a_secret_holds_is_not_in_the_error(secrets: Path) -> None:
    (secrets / "peerkv_tenants").write_text("[{not json at all")
    with pytest.raises(SettingsError, match="peerkv_tenants is not JSON") as caught:
        load()
    assert "not json at all" not in str(caught.value)


def test_a_directory_in_a_secrets_place_is_an_error(secrets: Path) -> None:
    (secrets / "peerkv_admin_key").mkdir()
    with pytest.raises(SettingsError, match="cannot read the secret"):
        load()
