"""Tenants: keys, salts, and the admin rule."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr

from gateway.errors import Forbidden, NotAuthenticated
from gateway.settings import Tenant
from gateway.tenants.access import AdminAccess, is_loopback
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


def scope(client: str | None = "127.0.0.1", host: bytes = b"localhost:8000", **headers: str) -> dict[str, Any]:
    raw = [(b"host", host), *((name.replace("_", "-").encode(), value.encode()) for name, value in headers.items())]
    return {"client": None if client is None else (client, 1), "headers": raw}


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", [b"localhost:8000", b"127.0.0.1", b"[::1]:8000", b"10.0.0.1:8000", b""])
def test_without_a_key_a_caller_on_this_machine_is_an_admin(client: str, host: bytes) -> None:
    AdminAccess(None).check(scope(client, host))


@pytest.mark.parametrize("client", ["10.0.0.1", "::ffff:10.0.0.1", "fe80::1", "", "localhost", None])
def test_without_a_key_nobody_else_is(client: str | None) -> None:
    with pytest.raises(Forbidden):
        AdminAccess(None).check(scope(client))


@pytest.mark.parametrize("header", ["x_forwarded_for", "forwarded", "x_real_ip", "via", "origin", "sec_fetch_site"])
def test_a_proxy_or_a_web_page_on_this_machine_is_not_an_admin(header: str) -> None:
    with pytest.raises(Forbidden):
        AdminAccess(None).check(scope(**{header: "127.0.0.1"}))


@pytest.mark.parametrize("host", [b"evil.example:8000", b"localhost.evil.example", b"127.0.0.1.evil.example"])
def test_a_name_that_somebody_made_point_here_is_not_enough(host: bytes) -> None:
    with pytest.raises(Forbidden):
        AdminAccess(None).check(scope(host=host))


def test_with_a_key_only_the_key_counts() -> None:
    access = AdminAccess(SecretStr("the-admin-key"))
    access.check(scope("10.0.0.1", b"any.example", authorization="Bearer the-admin-key", x_forwarded_for="1.2.3.4"))
    for headers in ({}, {"authorization": "Bearer the-admin-ke"}, {"x_forwarded_for": "127.0.0.1"}):
        with pytest.raises(NotAuthenticated):
            access.check(scope(**headers))


def test_what_is_no_address_is_not_loopback() -> None:
    assert not is_loopback("localhost")
