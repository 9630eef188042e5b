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


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "admin-key"
    path.write_text(KEY + "\n")
    return path


def test_a_setting_names_the_file_of_the_admin_key(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_ADMIN_KEY_FILE", str(key_file))
    assert admin_key() == KEY
    assert load().admin_key_file == key_file
    config = key_file.with_name("peerkv.toml")
    config.write_text(f'admin_key_file = "{key_file}"')
    monkeypatch.delenv("PEERKV_ADMIN_KEY_FILE")
    found = load(config=config).admin_key
    assert found is not None
    assert found.get_secret_value() == KEY


def test_a_setting_names_the_file_of_the_tenants(tmp_path: Path) -> None:
    path = tmp_path / "tenants.json"
    path.write_text('[{"name": "a", "api_key": "tenant-key-1"}]')
    assert [tenant.name for tenant in load({"tenants_file": path}).tenants] == ["a"]


def test_where_a_secret_is_named_decides_and_not_how(key_file: Path, secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag beats the environment, that a directory of secrets, that the settings file: as a value or as a file."""
    config = key_file.with_name("peerkv.toml")
    config.write_text(f'admin_key_file = "{key_file}"')
    monkeypatch.setenv("PEERKV_CONFIG", str(config))
    assert admin_key() == KEY
    (secrets / "peerkv_admin_key").write_text("from-the-directory")
    assert admin_key() == "from-the-directory"
    monkeypatch.setenv("PEERKV_ADMIN_KEY_FILE", str(key_file))
    assert admin_key() == KEY
    flagged = load({"admin_key": "from-the-flag"}).admin_key
    assert flagged is not None
    assert flagged.get_secret_value() == "from-the-flag"


def test_a_secret_and_its_file_side_by_side_are_an_error(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_ADMIN_KEY_FILE", str(key_file))
    monkeypatch.setenv("PEERKV_ADMIN_KEY", "from-the-environment")
    with pytest.raises(SettingsError, match="admin_key and admin_key_file: give one of them"):
        load()


@pytest.mark.parametrize("content", ["", " \n", None])
def test_a_named_file_without_anything_in_it_lets_nobody_in(key_file: Path, content: str | None) -> None:
    if content is None:
        key_file.unlink()
    else:
        key_file.write_text(content)
    with pytest.raises(SettingsError, match=r"nothing in the file .*admin-key"):
        load({"admin_key_file": key_file})


def test_what_is_wrong_in_a_named_file_is_said_with_its_name_and_without_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "tenants.json"
    path.write_text('[{"name": "a", "api_key": "short"}]')
    with pytest.raises(SettingsError, match=r"tenants\.json") as caught:
        load({"tenants_file": path})
    assert "short" not in str(caught.value).replace("too short", "")
    key = tmp_path / "key"
    key.write_text("tiny")
    with pytest.raises(SettingsError, match="admin_key") as caught:
        load({"admin_key_file": key})
    assert "tiny" not in str(caught.value)
