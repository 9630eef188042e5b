"""Tenants: keys and salts."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from gateway.errors import NotAuthenticated
from gateway.settings import Tenant
from gateway.tenants.tenants import ANONYMOUS, Tenants, bearer_token

A = Tenant(name="a", api_key=SecretStr("key-number-1"))
B = Tenant(name="b", api_key=SecretStr("key-number-2"), salt=SecretStr("given"))


def test_without_tenants_everybody_is_the_anonymous_one_without_a_salt() -> None:
    assert Tenants([]).authenticate(b"Bearer whatever") is ANONYMOUS
    assert ANONYMOUS.salt == ""


def test_salts_differ_and_do_not_show_the_key() -> None:
    tenants = Tenants([A, Tenant(name="c", api_key=SecretStr("key-number-3"))])
    a, c = (tenants.authenticate(f"Bearer key-number-{i}".encode()) for i in (1, 3))
    assert a.salt != c.salt
    assert "key-number-1" not in a.salt


def test_a_salt_survives_a_restart() -> None:
    assert Tenants([A]).authenticate(b"Bearer key-number-1") == Tenants([A]).authenticate(b"Bearer key-number-1")


def test_a_given_salt_is_used() -> None:
    assert Tenants([A, B]).authenticate(b"bearer  key-number-2").salt == "given"


@pytest.mark.parametrize("header", [None, b"", b"Bearer", b"Bearer ", b"Basic key-number-1", b"key-number-1", b"Bearer x"])
def test_nobody_else_gets_in(header: bytes | None) -> None:
    with pytest.raises(NotAuthenticated):
        Tenants([A]).authenticate(header)


def test_the_admin_is_a_tenant_with_a_salt_of_its_own() -> None:
    tenants = Tenants([A], SecretStr("the-admin-key"))
    admin = tenants.authenticate(b"Bearer the-admin-key")
    assert admin.name == "admin"
    assert admin.salt not in ("", tenants.authenticate(b"Bearer key-number-1").salt)


def test_an_admin_key_alone_does_not_close_the_gateway() -> None:
    assert Tenants([], SecretStr("the-admin-key")).authenticate(None) is ANONYMOUS


def test_a_bearer_token_is_found_in_any_case() -> None:
    assert bearer_token(b"BEARER abc") == b"abc"
