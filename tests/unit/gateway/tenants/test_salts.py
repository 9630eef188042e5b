"""Salts: whose are the same, that only the secret tells one, and where the secret comes from."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from gateway.errors import SettingsError
from gateway.settings import Settings, Tenant, load
from gateway.tenants.keys import Key, Keys, digest_of, no_keys
from gateway.tenants.salts import SECRET_BYTES_MAX, group_salt, kept_salt_secret, read_salt_secret, tenant_salt
from gateway.tenants.tenants import Tenants

SECRET, OTHER = b"a secret of tests", b"another one of tests"
names = st.text(min_size=1, max_size=20)


def of_file(name: str, tenant: str, group: str | None = None) -> Key:
    return Key(name=name, tenant=tenant, group=group, sha256=digest_of(name.encode()).hex())


def salt(tenants: Tenants, token: str) -> str:
    return tenants.authenticate(f"Bearer {token}".encode()).salt


@given(names, names)
def test_names_never_share_a_salt_and_a_group_is_no_tenant(first: str, second: str) -> None:
    assert (tenant_salt(SECRET, first) == tenant_salt(SECRET, second)) is (first == second)
    assert tenant_salt(SECRET, first) != group_salt(SECRET, second)
    assert tenant_salt(SECRET, first) != tenant_salt(OTHER, first)


def test_a_salt_is_an_hmac_with_the_servers_secret_and_not_with_what_callers_know() -> None:
    api_key = "key-of-the-tenant"
    found = salt(Tenants([Tenant(name="t", api_key=SecretStr(api_key))], salt_secret=SECRET), api_key)
    message = b"peerkv tenant salt v1" + b"t"
    assert found == hmac.new(SECRET, message, hashlib.sha256).hexdigest()
    assert found != hmac.new(api_key.encode(), message, hashlib.sha256).hexdigest()


def test_tenants_of_a_group_share_a_salt_wherever_their_keys_are() -> None:
    settings = [Tenant(name="s", api_key=SecretStr("key-of-s"), group="g"), Tenant(name="g", api_key=SecretStr("key-of-g"))]
    keys = Keys(salt_secret="ab" * 32, keys=(of_file("x", "t", "g"), of_file("y", "u", "g"), of_file("z", "v")))
    tenants = Tenants(settings, keys=keys)
    assert salt(tenants, "x") == salt(tenants, "y") == salt(tenants, "key-of-s")
    assert len({salt(tenants, token) for token in ("x", "z", "key-of-g")}) == 3
    assert tenants.named("t").salt == tenants.named("u").salt != tenants.named("v").salt  # type: ignore[union-attr]


def test_keys_of_one_tenant_are_of_one_group() -> None:
    with pytest.raises(ValueError, match="'t' are of different groups"):
        Keys(salt_secret="ab" * 32, keys=(of_file("x", "t", "g"), of_file("y", "t")))


def test_a_tenant_has_a_salt_of_its_own_or_a_group() -> None:
    both = Tenant(name="t", api_key=SecretStr("key-of-t"), salt=SecretStr("s"), group="g")
    with pytest.raises(ValueError, match="'t' has a salt and a group"):
        Settings(tenants=(both,))


def test_the_settings_secret_goes_before_that_of_the_keys_file() -> None:
    tenant, keys = Tenant(name="s", api_key=SecretStr("key-of-s")), Keys(salt_secret="ab" * 32, keys=(of_file("x", "t"),))
    by_file, given = Tenants([tenant], keys=keys), Tenants([tenant], keys=keys, salt_secret=SECRET)
    assert (salt(by_file, "x"), salt(by_file, "key-of-s")) == tuple(
        tenant_salt(bytes.fromhex("ab" * 32), each) for each in "ts"
    )
    assert (salt(given, "x"), salt(given, "key-of-s")) == tuple(tenant_salt(SECRET, each) for each in "ts")
    given.configure([tenant], None)
    given.use(Keys(salt_secret="cd" * 32, keys=keys.keys))
    assert salt(given, "x") == tenant_salt(SECRET, "t")


def test_a_secret_of_our_own_is_made_once_for_its_owner_alone_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "state" / "salt-secret"
    with ThreadPoolExecutor(8) as threads:  # gateways that start at once
        found = set(threads.map(lambda _: kept_salt_secret(path), range(8)))
    assert found == {kept_salt_secret(path)}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [path.name]
    assert len(bytes.fromhex(path.read_text())) == 32


def test_a_secret_is_made_once_and_only_where_somebody_has_a_salt() -> None:
    made: list[bytes] = []

    def make() -> bytes:
        made.append(SECRET)
        return SECRET

    tenants = Tenants([], SecretStr("an-admin-key"), make_secret=make)
    assert made == []
    for name in "tu":
        tenants.configure([Tenant(name=name, api_key=SecretStr(f"key-of-{name}"))], None)
        assert salt(tenants, f"key-of-{name}") == tenant_salt(SECRET, name)
    assert made == [SECRET]


def test_tenants_for_whom_there_is_no_secret_leave_all_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "salt-secret").write_text("short")
    tenants = Tenants([], make_secret=lambda: kept_salt_secret(tmp_path / "salt-secret"))
    with pytest.raises(SettingsError, match="has to hold"):
        tenants.configure([Tenant(name="t", api_key=SecretStr("key-of-t"))], None)
    assert tenants.open
    tenants.use(no_keys())
    assert tenants.named("t") is None


def test_where_no_secret_can_be_kept_it_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "file").touch()
    assert kept_salt_secret(tmp_path / "file" / "salt-secret") != kept_salt_secret(tmp_path / "file" / "salt-secret")
    assert "is lost with a restart" in caplog.text


@pytest.mark.parametrize("content", [b"", b" short \n", b"x" * (SECRET_BYTES_MAX + 1)])
def test_a_file_that_holds_no_secret_is_an_error_without_what_it_holds(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "salt-secret"
    path.write_bytes(content)
    for read in (read_salt_secret, kept_salt_secret):
        with pytest.raises(SettingsError, match="has to hold 16 to 4096 bytes") as caught:
            read(path)
        assert "short" not in str(caught.value)


def test_a_file_that_is_named_and_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="salt_secret_file: cannot read"):
        read_salt_secret(tmp_path / "none")


def test_the_secret_may_come_with_the_other_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_SECRETS_DIR", str(tmp_path))
    assert load().salt_secret_file is None
    (tmp_path / "peerkv_salt_secret").write_bytes(SECRET + b"\n")
    path = load().salt_secret_file
    assert path is not None
    assert read_salt_secret(path) == SECRET
